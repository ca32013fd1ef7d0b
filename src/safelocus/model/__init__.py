"""The model under study: its weights and what each is for, its chat format, its passes forward and its answers."""
