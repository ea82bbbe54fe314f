"""The compiled kernels: their algebra as written, and, where there is a compiler, what comes out of it."""

import math

import pytest
import torch

from klkit.divergences.backends import eager, graphs, inductor
from klkit.divergences.sums import COLUMNS, RowSums, norms_of, values
from klkit.numerics import FLOOR

NO = -math.inf
COMPILER = pytest.mark.skipif(not inductor.available(), reason="torch.compile finds no compiler")
KERNELS = ["as written", pytest.param("compiled", marks=[pytest.mark.slow, COMPILER])]


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    """The backend, its graphs compiled or not."""
    if request.param == "as written":
        monkeypatch.setattr(inductor, "_compiled", lambda function, device: function)
    return inductor


def normal(seed: int, rows: int, size: int) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def noisy(scale: float, rows: int = 4, size: int = 50257) -> tuple[torch.Tensor, torch.Tensor]:
    a = 3 * normal(0, rows, size)
    return a, a + scale * normal(1, rows, size)


def found(module, a: torch.Tensor, b: torch.Tensor):
    sums = RowSums(*module.row_sums(a, b).unbind(1))
    return sums, values(sums)


DIVERGENCES = ("kl", "reverse_kl", "variance_ratio")


def against_double(kernels, a, b, *, rtol=4e-6, skip=()):
    """All sums that any quantity is made of, and all quantities, beside those of the same logits in double."""
    sums, got = found(kernels, a, b)
    exact, expected = found(eager, a.double(), b.double())
    for name in ("top_p", "top_q", "reference", "paired", "greatest"):
        assert torch.equal(getattr(sums, name), getattr(exact, name)), name
    for name in set(got._fields) - set(skip):
        value, true = getattr(got, name), getattr(expected, name)
        bounds = {"rtol": rtol, "atol": 1e-16} if name in DIVERGENCES else {"rtol": 10 * rtol, "atol": 1e-6}
        torch.testing.assert_close(value, true, **bounds, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(sums.least < FLOOR / 2, exact.least < FLOOR / 2)
    assert torch.equal(sums.most > -FLOOR / 2, exact.most > -FLOOR / 2)
    assert bool((got.kl >= 0).all())
    assert bool((got.reverse_kl >= 0).all())


@pytest.mark.parametrize(
    ("scale", "rtol"), [(1.0, 1e-6), (0.3, 2e-6), (1e-2, 1e-6), (1e-3, 1e-6), (1e-4, 1e-6)], ids="{:g}".format
)
def test_divergences_from_half_a_nat_to_a_billionth(kernels, scale, rtol):
    against_double(kernels, *noisy(scale), rtol=rtol)


def test_equal_rows(kernels):
    a, _ = noisy(0.0)
    for b in (a.clone(), a + 7.3):
        _, got = found(kernels, a, b)
        assert bool((got.kl < 1e-12).all())
        assert bool((got.reverse_kl < 1e-12).all())
    assert not found(kernels, a, a.clone())[1].kl.any()


def test_large_logits_and_offsets(kernels):
    a, b = noisy(0.3)
    against_double(kernels, a + 1e4, b + 1e4)
    close = torch.where(a > 6, 3e4 + a, 3000 * a - 1e5)
    against_double(kernels, close, close + 0.3 * normal(2, *a.shape))


@pytest.mark.parametrize("where", ["leading blocks", "anywhere"])
@pytest.mark.parametrize("which", ["both", "p", "q"])
def test_excluded_tokens(kernels, where, which):
    a, b = noisy(0.3)
    gone = torch.zeros(a.shape, dtype=torch.bool)
    if where == "leading blocks":
        gone[:, :9000] = True
    else:
        gone |= normal(2, *a.shape) > 0
    gone.scatter_(1, a.argmax(1, keepdim=True), False)
    if which != "q":
        a = a.masked_fill(gone, NO)
    if which != "p":
        b = b.masked_fill(gone, NO)
    against_double(kernels, a, b, skip=("shift",), rtol=1e-5)
    _, got = found(kernels, a, b)
    assert bool(got.kl.isinf().all()) == (which == "q")
    assert bool(got.reverse_kl.isinf().all()) == (which == "p")


def test_one_hot_rows(kernels):
    a, b = torch.full((3, 5000), -50.0), 3 * normal(1, 3, 5000)
    a[:, 4700] = 40.0
    against_double(kernels, a, b, skip=("entropy_p", "variance_logp", "variance_ratio"))
    against_double(kernels, b, a, skip=("entropy_q", "variance_ratio"))


@pytest.mark.parametrize("size", [5000, 3 * graphs.BLOCK])
def test_one_token_far_from_all_others(kernels, size):
    # The largest logit of q in a block is no measure of where the block's other logits are.
    a = 0.1 * normal(0, 4, size)
    b = a + 1e-3 * normal(1, 4, size)
    b[:, [17, 2000]] += torch.tensor([[3.0], [6.0], [9.0], [12.0]])
    against_double(kernels, a, b)
    against_double(kernels, b, a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats_are_widened(kernels, dtype):
    a, b = (x.to(dtype) for x in noisy(0.02))
    against_double(kernels, a, b)


@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("size", [3072, 4095, 4097, 8192])
def test_blocks_cover_each_row_once(kernels, rows, size):
    against_double(kernels, *noisy(0.3, rows, size))


def test_rows_of_a_wider_tensor(kernels):
    a, b = noisy(0.3, 5, 6000)
    mine = kernels.row_sums(a[:, 100:5100], b[:, 100:5100])
    torch.testing.assert_close(mine, kernels.row_sums(a[:, 100:5100].contiguous(), b[:, 100:5100].contiguous()))


def test_what_is_no_law_is_refused(kernels):
    for bad in (math.nan, math.inf):
        a, b = noisy(0.3, 2, 5000)
        a[1, 4990] = bad
        with pytest.raises(ValueError, match="row 1 of 2 of p"):
            found(kernels, a, b)


def gradients_of(kernels, a, b, tokens, norms, slopes, *, out_a, out_b):
    kernels.gradients(a, b, tokens, norms, slopes, out_a, out_b)
    return out_a, out_b


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_gradients(kernels, mixed, scale):
    a, b = noisy(scale, 5, 5003)
    sums, row = found(eager, a.double(), b.double())
    norms, tokens = norms_of(sums, row), torch.arange(5) * 900
    # Each coefficient in a row of its own, in the logits of p and of q.
    slopes = torch.eye(6, dtype=torch.float64)[[0, 1, 2, 3, 4 if mixed else 5]].repeat(1, 2)
    exact = gradients_of(eager, a.double(), b.double(), tokens, norms, slopes, **outs(a.double(), b.double()))
    for places in ("apart", "in place", "p only", "q only"):
        x, y = a.clone(), b.clone()
        given = {"out_a": x, "out_b": y} if places == "in place" else outs(a, b)
        given |= {"p only": {"out_b": None}, "q only": {"out_a": None}}.get(places, {})
        got = gradients_of(kernels, x, y, tokens, norms, slopes, **given)
        for mine, true in zip(got, exact, strict=True):
            if mine is not None:
                assert bool(((mine.double() - true).norm(dim=1) <= 2e-6 * true.norm(dim=1)).all()), places
        if places != "in place":
            assert torch.equal(x, a)
            assert torch.equal(y, b)


def test_gradients_where_p_excludes_tokens(kernels):
    a, b = noisy(0.3, 4, 5003)
    a[:, ::3] = NO
    sums, row = found(eager, a.double(), b.double())
    norms, tokens = norms_of(sums, row), torch.ones(4, dtype=torch.long)
    slopes = torch.eye(6, dtype=torch.float64)[[0, 1, 3, 4]].repeat(1, 2)
    exact = gradients_of(eager, a.double(), b.double(), tokens, norms, slopes, **outs(a.double(), b.double()))
    for mine, true in zip(gradients_of(kernels, a, b, tokens, norms, slopes, **outs(a, b)), exact, strict=True):
        assert bool(((mine.double() - true).norm(dim=1) <= 2e-6 * true.norm(dim=1)).all())


def outs(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"out_a": torch.full_like(a, math.nan), "out_b": torch.full_like(b, math.nan)}


def test_gradients_of_logits_that_share_memory(kernels):
    pair = torch.stack(noisy(0.3, 3, 4000))
    apart = [x.clone() for x in pair]
    sums, row = found(eager, *pair)
    rest = torch.arange(3), norms_of(sums, row), torch.rand(3, 12, dtype=torch.float64)
    eager.gradients(*apart, *rest, *apart)
    kernels.gradients(*pair, *rest, *pair)
    torch.testing.assert_close(pair, torch.stack(apart), rtol=2e-6, atol=1e-9)


def test_second_sweep(kernels):
    for scale in (1.0, 1e-2):
        a, b = noisy(scale, 3, 5003)
        sums, row = found(eager, a.double(), b.double())
        norms = norms_of(sums, row)
        x = a.clone()
        got = kernels.second_sweep(x, b, norms, overwrite=True)
        exact = eager.second_sweep(a.double(), b.double(), norms)
        torch.testing.assert_close(got[:, ::2], exact[:, ::2], rtol=4e-6, atol=0)
        torch.testing.assert_close(got[:, 1], exact[:, 1], rtol=4e-6, atol=5e-9)  # its terms have both signs
        torch.testing.assert_close(x.double(), a.double().softmax(-1), rtol=4e-6, atol=1e-30)
        assert torch.equal(kernels.second_sweep(a, b, norms), got)


@pytest.mark.parametrize(("rows", "size"), [(0, 5000), (1, 5000), (33, 2), (2, 3), (2, 1000), (2, 1024), (2, 1025)])
def test_what_is_too_small_to_compile_for_is_not_compiled(monkeypatch, rows, size):
    monkeypatch.setattr(inductor, "_compiled", lambda function, device: pytest.fail("compiled"))
    a, b = noisy(0.3, rows, size)
    assert inductor.row_sums(a, b).shape == (rows, COLUMNS)
    assert torch.equal(inductor.row_sums(a, b), eager.row_sums(a, b))


def test_double_precision_is_kept(monkeypatch):
    monkeypatch.setattr(inductor, "_compiled", lambda function, device: pytest.fail("compiled"))
    a, b = (x.double() for x in noisy(1e-4, 2, 5000))
    assert torch.equal(inductor.row_sums(a, b), eager.row_sums(a, b))


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    inductor._compiled.cache_clear()
    try:
        assert not inductor.available()
        with pytest.raises(ImportError, match="set CXX, or choose the eager backend"):
            inductor.row_sums(*noisy(0.3, 2, 5000))
    finally:
        inductor._compiled.cache_clear()


@COMPILER
def test_one_kernel_serves_every_size():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, size in ((3, 50257), (2, 5003), (33, 4097)):
            against_double(inductor, *noisy(0.01, rows, size))


@pytest.mark.slow
@COMPILER
def test_nothing_of_the_size_of_the_logits_is_allocated():
    a, b = noisy(0.3, 64, 50257)
    sums, row = found(inductor, a, b)
    rest = torch.arange(64), norms_of(sums, row), torch.rand(64, 12, dtype=torch.float64)
    inductor.gradients(a.clone(), b.clone(), *rest, *(z.clone() for z in (a, b)))

    def largest(work):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(e.nbytes() for e in events)

    one = a.numel() * a.element_size()
    assert largest(lambda: inductor.row_sums(a, b)) < one / 10
    assert largest(lambda: inductor.second_sweep(a, b, rest[1])) < one / 10
    assert largest(lambda: inductor.gradients(a, b, *rest, a, b)) < one / 10
