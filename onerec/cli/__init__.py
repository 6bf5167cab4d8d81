"""The `onerec` command: the parser and the printer of each verb, one file a verb."""
