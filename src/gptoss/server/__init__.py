"""The model over HTTP, as clients of OpenAI's API know it. Needs ``pip install 'gptoss[serve]'``."""
