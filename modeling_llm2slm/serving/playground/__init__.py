"""
A page that shows the LLM and the LLM-to-SLM model at work on the same prompt. `page.py` needs gradio.

| module | content |
| --- | --- |
| `llm.py` | the LLM that the model is compared with |
| `comparison.py` | generate with both, and measure |
| `html.py` | outputs and times as HTML |
| `page.py`, `page.css`, `page.js` | the page |
"""
