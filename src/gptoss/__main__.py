"""``python -m gptoss``: the command, also as ``torchrun -m gptoss`` starts it."""

from gptoss.cli.main import main

main()
