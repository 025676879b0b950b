"""From a run of timm's train.py to a repository on the Hugging Face Hub, and the model cards that go with it."""
