"""What the demo ships: a trained LLM, and examples of English sentences with their German translations."""

from pathlib import Path


HERE = Path(__file__).parent
LLM = HERE / "llm"
DATA = {split: str(HERE / "data" / f"{split}.jsonl.gz") for split in ("train", "validation", "test")}
