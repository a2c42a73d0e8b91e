"""The model over HTTP, as OpenAI's API has it. Needs ``pip install 'gptoss[serve]'``."""
