import pytest
from torch.nn.attention import flex_attention


@pytest.fixture
def flex_gradients_on_the_cpu(monkeypatch):
    """PyTorch refuses flex_attention's gradients on a CPU, for want of a kernel."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
