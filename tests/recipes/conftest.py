import pytest

from tests.tiny_folder import save_tiny_model, tiny_tokenizer


@pytest.fixture
def tokenizer():
    """A byte-level tokenizer with a chat template of its own system prompt, whose padding is its end token."""
    return tiny_tokenizer()


@pytest.fixture
def tiny_model(tmp_path):
    """Folder of a random Llama of two layers, with its tokenizer."""
    return save_tiny_model(tmp_path / "model")
