"""Other people's checkpoints: how they are found, read, mapped onto finectl's models and written."""
