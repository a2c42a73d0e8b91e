"""``python -m gptoss.cli``."""

from gptoss.cli.main import main

main()
