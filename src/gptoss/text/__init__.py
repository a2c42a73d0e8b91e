"""Words to tokens and back: the tokenizer, the harmony format, the parser."""
