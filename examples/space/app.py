"""
A Space that compares an LLM-to-SLM model with its LLM. These variables of the Space say what it shows:

- `MODEL`: the LLM-to-SLM model, a name on the Hub or a folder of the Space. Default: `model`.
- `LLM`: the LLM to compare with. Default: the one that the checkpoint names.
- `EXAMPLES`: a file with example prompts. Default: `examples.txt`, if it is there.
"""

import os
from pathlib import Path

import llm2slm


HERE = Path(__file__).parent


def main() -> None:
    """Serve the page, and OpenAI's completions API with it, on the port that a Space opens."""
    arguments = ["serve", os.environ.get("MODEL", "model"), "--playground", "--host", "0.0.0.0"]
    arguments += ["--port", os.environ.get("GRADIO_SERVER_PORT", "7860")]
    if llm := os.environ.get("LLM"):
        arguments += ["--llm", llm]
    if Path(examples := os.environ.get("EXAMPLES", "examples.txt")).is_file():
        arguments += ["--examples", examples]
    llm2slm.main(arguments)


if __name__ == "__main__":
    os.chdir(HERE)
    main()
