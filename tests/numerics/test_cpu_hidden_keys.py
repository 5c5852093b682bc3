"""`cpu`: what stands in keys that a mask hides is of no account, NaN and infinities too."""

import pytest
import torch

from fa3_compile.runtime import op  # noqa: F401, defines it
from fa3_compile.testing import assert_matches_eager

attention = torch.ops.fa3.attention
SEEN = torch.arange(24) < torch.tensor([[24], [9]])  # of two sequences, the second padded

MASKS = {
    "padding": "mask=load(0, b, kv) != 0",
    "padding, causal": "mask=(kv <= q) & (load(0, b, kv) != 0)",
    "padding, a window": "mask=(q - kv < 4) & (load(0, b, kv) != 0), dead=zero",
    "padding, a fill": "mask=load(0, b, kv) != 0, dead=score, fill=-3.4028234663852886e38",
    "padding, ALiBi": "score=0.25*s + load(1, 0, h)*(kv - q), mask=load(0, b, kv) != 0",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", MASKS.values(), ids=MASKS)
def test_hidden_keys(fields, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 24, dim, generator=generator).to(dtype)
        for heads, dim in ((4, 16), (2, 16), (2, 12))
    )
    keys = SEEN[:, None, :, None]
    hostile = torch.where(keys, k, torch.nan)
    hostile[..., 3] = torch.where(keys[..., 0], k[..., 3], torch.inf)
    score = "" if "score" in fields else "score=0.25*s, "
    text = f"attention({score}{fields}, aux=[bool, float]) #;kernels=cpu"
    aux = [SEEN, torch.rand(1, 4)]
    found, wanted = (attention(q, x, v, aux, [], text) for x in (hostile, torch.where(keys, k, 0)))
    tolerance = 2e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


def test_keys_that_are_seen_are_not_hidden():
    q, k, v = (torch.randn(1, 2, 24, 16) for _ in range(3))
    k[0, 0, 5, 2] = torch.nan
    text = "attention(score=0.25*s, mask=kv - q < 3, dead=nan) #;kernels=cpu"
    out, lse = attention(q, k, v, [], [], text)
    rows = torch.arange(24) > 2
    assert torch.equal(lse[0].isnan(), torch.stack([rows, torch.zeros(24, dtype=torch.bool)]))
    assert torch.equal(out[0].isnan().all(-1), lse[0].isnan())


def test_norms_of_padding():
    """0 / 0, in a model that fills the scores of padded keys."""

    def model(x, seen):
        k = x / x.norm(dim=-1, keepdim=True)
        scores = (x @ k.mT).masked_fill(~seen[:, None], -torch.inf)
        return scores.softmax(-1) @ x

    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0)) * SEEN[..., None]
    report = assert_matches_eager(model, x, SEEN)
    assert [(x.fused, x.kernel) for x in report.regions] == [(True, "cpu")]
