() => {
  // Screen readers announce the verdict when it changes.
  const live = document.getElementById("verdict");
  if (live) {
    live.setAttribute("role", "status");
    live.setAttribute("aria-live", "polite");
  }

  // Say so when the server is gone, and when it is back.
  const alert = document.createElement("div");
  alert.id = "server-gone";
  alert.setAttribute("role", "alert");
  document.body.append(alert);
  const message =
    "The server does not respond: it was stopped, or the connection is lost. Start it again with llm2slm serve; " +
    "this page continues as soon as it is back.";
  const isHere = () =>
    fetch("gradio_api/app_id", { cache: "no-store", signal: AbortSignal.timeout(10000) }).then(
      (response) => response.status < 500,
      () => false,
    );
  const check = async () => {
    if (!document.hidden) {
      const text = (await isHere()) ? "" : message;
      if (alert.textContent !== text) alert.textContent = text;
    }
    setTimeout(check, 2500);
  };
  check();
};
