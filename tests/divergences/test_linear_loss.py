"""The loss from hidden states and heads, against automatic differentiation of all logits in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from divergences.heads import case, normal, oracle
from klkit.divergences import linear
from klkit.divergences import linear_loss as module
from klkit.divergences.linear import Head
from klkit.divergences.linear_loss import Weights, chunk_rows, linear_loss

NAMES = Weights._fields


def weights_of(rows: int, *names: str) -> dict[str, Tensor]:
    return {name: normal(rows, seed=100 + NAMES.index(name)) for name in names}


def check(x, weights, *, tolerance=1e-10, **options):
    loss, found = linear_loss(*x.arguments(), Weights(**weights), **options)
    wanted, grads = oracle(x, weights)
    plain = x.plain()
    for name, value in found._asdict().items():
        if value is not None:
            torch.testing.assert_close(value.double(), getattr(plain, name).detach(), rtol=1e-9 + tolerance, atol=1e-10)
    torch.testing.assert_close(loss.detach().double(), wanted, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(loss, x.leaves(), allow_unused=True)
    for one, other in zip(got, grads, strict=True):
        assert (one is None) == (other is None) or (other is None and not bool(one.any()))
        if other is not None:
            torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_each_quantity(name):
    check(case(), weights_of(11, name), rows=4)


VARIANTS = {
    "plain": {"biased": False},
    "scaled": {"factor": (0.5, 2.0)},
    "capped": {"cap": (1.5, None), "factor": (2.0, 1.0)},
    "capped twice": {"cap": (3.0, 2.0), "biased": False},
    "padded": {"tokens": 37, "size": (30, 30)},
    "unequal": {"tokens": 20, "size": (20, 23)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [None, 1, 3, 11, 50])
def test_all_quantities_together(variant, rows):
    # q may have tokens that p lacks, but then the reverse divergence is infinite.
    names = [name for name in NAMES if variant != "unequal" or name != "reverse_kl"]
    check(case(**VARIANTS[variant]), weights_of(11, *names), rows=rows)


@pytest.mark.parametrize("grads", ["h", "w", "b", "H", "W", "hw", "hW", "wb", "HWB"])
def test_only_what_needs_a_gradient(grads):
    x = case(grads=grads)
    check(x, weights_of(11, "kl", "reverse_kl", "logq"), rows=4)


def test_small_tiles(monkeypatch):
    monkeypatch.setattr(linear, "TILE_BYTES", 8 * 5 * 6)  # 6 rows of p's weight, 4 of q's
    check(case(size=(30, 30)), weights_of(11, *NAMES), rows=4)


def test_no_rows():
    x = case(rows=0)
    loss, found = linear_loss(*x.arguments(), Weights(kl=normal(0), logp=normal(0)))
    assert loss.item() == 0.0
    assert found.kl.shape == (0,)
    assert not any(bool(grad.any()) for grad in torch.autograd.grad(loss, x.leaves()))


def test_gradcheck():
    x = case(rows=3, tokens=5, widths=(2, 3), cap=(2.0, None), factor=(0.7, 1.3))
    weights = Weights(**weights_of(3, *NAMES))

    def loss(h, w, b, hq, wq, bq):
        p, q = Head(w, b, 0.7, 2.0), Head(wq, bq, 1.3)
        return linear_loss(h, p, hq, q, x.tokens, weights, rows=2)[0]

    inputs = (x.hidden[0], x.weight[0], x.bias[0], x.hidden[1], x.weight[1], x.bias[1])
    assert torch.autograd.gradcheck(loss, inputs)


class TestWeights:
    def test_a_function_is_called_from_the_end(self):
        """The score-function gradient of a sequence: a token is weighed by the divergences after it."""
        x, string = case(grads="hw"), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
        plain = x.plain().kl.detach()
        later = torch.stack([plain[n + 1 :][string[n + 1 :] == string[n]].sum() for n in range(11)])
        carry, places = torch.zeros(3, dtype=torch.float64), []

        def weigh(found, rows):
            places.append((rows.start, rows.stop))
            score = torch.empty_like(found.kl)
            for n in reversed(range(len(score))):
                i = string[rows][n]
                score[n] = carry[i]
                carry[i] += found.kl[n]
            return Weights(kl=torch.ones_like(found.kl), logp=score)

        loss, _ = linear_loss(*x.arguments(), weigh, rows=4)
        _, wanted = oracle(x, {"kl": torch.ones(11), "logp": later})
        for got, grad in zip(torch.autograd.grad(loss, x.leaves()), wanted, strict=True):
            torch.testing.assert_close(got, grad)
        assert places == [(8, 11), (4, 8), (0, 4)]

    def test_what_is_infinite_can_be_silenced(self):
        x = case(tokens=20, size=(23, 20), grads="hwH")
        on = torch.zeros(11, dtype=torch.float64)
        loss, found = linear_loss(*x.arguments(), Weights(kl=on, reverse_kl=on + 1))
        assert bool((found.kl == torch.inf).all())
        assert loss.item() == pytest.approx(float(found.reverse_kl.sum()))
        check(x, {"reverse_kl": on + 1})

    def test_infinite_rows_have_no_gradient(self):
        x = case(tokens=20, size=(23, 20))
        loss, _ = linear_loss(*x.arguments(), Weights(kl=torch.ones(11)))
        assert loss.item() == torch.inf
        assert not any(bool(grad.any()) for grad in torch.autograd.grad(loss, x.leaves()))

    def test_none_at_all(self):
        loss, found = linear_loss(*case().arguments(), Weights(), js=True)
        assert loss.item() == 0.0
        assert found.js is not None

    def test_tokens_only_where_wanted(self):
        x = case()
        x.tokens = None
        found = linear_loss(*x.arguments(), Weights(kl=torch.ones(11)))[1]
        assert found.logp is None
        assert found.js is None
        with pytest.raises(ValueError, match="expected tokens"):
            linear_loss(*x.arguments(), Weights(logq=torch.ones(11)))

    @pytest.mark.parametrize("shape", [(), (10,), (11, 1)])
    def test_as_many_as_rows(self, shape):
        with pytest.raises(ValueError, match="expected 11 weights of js"):
            linear_loss(*case().arguments(), Weights(js=torch.ones(shape)))
        with pytest.raises(ValueError, match="expected 11 weights of kl"):
            linear_loss(*case().arguments(), lambda found, rows: Weights(kl=torch.ones(shape)))


class TestAutograd:
    def test_one_parameter_everywhere(self):
        """Embedding, head of p and head of q are one tensor: its gradients add up, and are formed in one place."""
        table = normal(30, 6).requires_grad_()
        inputs = torch.arange(9)
        other = normal(9, 6, seed=1)

        def losses(read):
            hidden = table[inputs].tanh()
            return read(hidden)

        weights = {"kl": normal(9, seed=3), "reverse_kl": normal(9, seed=4)}
        sizes = (25, 25)
        x = case()
        x.weight, x.bias, x.size, x.tokens = (table, table), (None, None), sizes, None

        def fused(hidden):
            x.hidden = (hidden, other)
            return linear_loss(*x.arguments(), Weights(**weights), rows=4)[0]

        def plain(hidden):
            x.hidden = (hidden, other)
            found = x.plain()._asdict()
            return sum((weight * found[name]).sum() for name, weight in weights.items())

        (got,) = torch.autograd.grad(losses(fused), table)
        (wanted,) = torch.autograd.grad(losses(plain), table)
        torch.testing.assert_close(got, wanted)
        assert bool((got[25:] == 0).all())

    def test_heads_of_unequal_size_on_one_parameter(self):
        x = case(rows=5, widths=(6, 6), biased=False)
        x.weight, x.size, x.tokens = (x.weight[0], x.weight[0]), (20, 31), None
        check(x, weights_of(5, "kl", "js"), rows=2)

    def test_upstream_factors_and_graphs_that_are_kept(self):
        x = case()
        loss, _ = linear_loss(*x.arguments(), Weights(kl=torch.ones(11)))
        first = torch.autograd.grad(loss, x.leaves(), retain_graph=True)
        again = torch.autograd.grad(3 * loss, x.leaves(), retain_graph=True)
        last = torch.autograd.grad(-2 * loss, x.leaves())
        for one, two, three in zip(first, again, last, strict=True):
            torch.testing.assert_close(two, 3 * one)
            torch.testing.assert_close(three, -2 * one)

    def test_gradients_accumulate(self):
        x = case(grads="hw")
        for _ in range(2):
            linear_loss(*x.arguments(), Weights(kl=torch.ones(11)))[0].backward()
        _, wanted = oracle(x, {"kl": torch.ones(11)})
        torch.testing.assert_close(x.weight[0].grad, 2 * wanted[1])

    def test_a_second_derivative_is_refused(self):
        x = case()
        loss, _ = linear_loss(*x.arguments(), Weights(kl=torch.ones(11)))
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(loss, x.leaves(), create_graph=True)

    def test_quantities_have_no_graph(self):
        _, found = linear_loss(*case().arguments(), Weights(kl=torch.ones(11)))
        assert not any(value.requires_grad for value in found if value is not None)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant):
        x = case(grads="hw")
        p, q = x.heads()

        def run(hidden):
            return linear_loss(hidden, p, x.hidden[1], q, x.tokens, Weights(**weights_of(11, "kl", "logp")))[0]

        loss = checkpoint(run, x.hidden[0], use_reentrant=reentrant)
        loss.backward()
        _, wanted = oracle(x, weights_of(11, "kl", "logp"))
        torch.testing.assert_close(x.hidden[0].grad, wanted[0])
        torch.testing.assert_close(x.weight[0].grad, wanted[1])

    def test_autocast(self):
        x = case(dtype=torch.float32, grads="hw", biased=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = linear_loss(*x.arguments(), Weights(kl=torch.ones(11)))
        assert loss.dtype == torch.float32
        loss.backward()
        _, wanted = oracle(x, {"kl": torch.ones(11)})
        torch.testing.assert_close(x.weight[0].grad.double(), wanted[1].double(), rtol=1e-4, atol=1e-4)

    def test_without_gradients(self):
        x = case()
        with torch.no_grad():
            loss, found = linear_loss(*x.arguments(), Weights(kl=torch.ones(11)))
        assert not loss.requires_grad
        torch.testing.assert_close(found.kl, x.plain().kl.detach())


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_realistic_head(self, dtype):
        x = case(96, 3000, (64, 48), dtype=dtype, grads="hwb", spread=0.4)
        weights = {"kl": torch.rand(96) / 96, "logp": torch.rand(96) / 96}
        loss, _ = linear_loss(*x.arguments(), Weights(**weights), rows=40)
        assert loss.dtype == torch.float32
        _, wanted = oracle(x, weights)
        for got, grad in zip(torch.autograd.grad(loss, x.leaves()), wanted, strict=True):
            assert got.dtype == dtype
            error = float((got.double() - grad.double()).norm() / grad.double().norm())
            assert error < {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]

    def test_p_near_q_in_half_precision(self):
        """Logits rounded to bf16 would cost a tenth of the gradient here; ours are not."""
        hidden, weight = (0.3 * normal(64, 64)).bfloat16(), (0.5 * normal(2000, 64, seed=1)).bfloat16()
        x = case()
        x.hidden = (hidden.clone().requires_grad_(), (hidden + 0.02 * normal(64, 64, seed=2)).bfloat16())
        x.weight, x.bias, x.tokens = (weight.clone().requires_grad_(), weight), (None, None), None
        weights = {"kl": torch.full((64,), 1 / 64)}
        loss, found = linear_loss(*x.arguments(), Weights(**weights))
        assert 1e-4 < float(found.kl.mean()) < 1e-1
        _, wanted = oracle(x, weights)
        for got, grad in zip(torch.autograd.grad(loss, x.leaves()), wanted, strict=True):
            assert float((got.double() - grad.double()).norm() / grad.double().norm()) < 5e-3


class Largest(TorchDispatchMode):
    """The most values that any one new tensor in single precision holds."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                self.values = max(self.values, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_nothing_of_the_size_of_all_logits(monkeypatch):
    rows, tokens = 300, 2000
    x = case(rows, tokens, (8, 8), dtype=torch.float32)
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 4 * 20 * tokens)  # 20 rows
    with Largest() as largest:
        linear_loss(*x.arguments(), Weights(kl=torch.ones(rows), logp=torch.ones(rows)))[0].backward()
    assert 15 * tokens <= largest.values <= 21 * tokens  # a kernel's buffers may be a little wider


def test_half_precision_heads_are_never_widened_whole(monkeypatch):
    rows, tokens, width = 4, 3000, 64
    monkeypatch.setattr(linear, "TILE_BYTES", 4 * width * 300)  # 300 rows
    x = case(rows, tokens, (width, width), dtype=torch.bfloat16, grads="h", biased=False)
    with Largest() as largest:
        linear_loss(*x.arguments(), Weights(kl=torch.ones(rows)))[0].backward()
    assert largest.values <= 300 * width


def test_chunks_are_equal_and_bounded():
    cpu = torch.device("cpu")
    assert chunk_rows(512, 50257, torch.float32, cpu, trained=True) == 171
    assert chunk_rows(520, 50257, torch.float32, cpu, trained=True) == 174
    assert chunk_rows(512, 50257, torch.float32, cpu, trained=False) == 64
    assert chunk_rows(4096, 262144, torch.float32, cpu, trained=True) == 64
    assert chunk_rows(0, 100, torch.float32, cpu, trained=True) == 1


class TestRefusals:
    def test_hidden_states_of_another_width(self):
        x = case()
        with pytest.raises((ValueError, TypeError), match="hidden states of q"):
            linear_loss(x.hidden[0], x.heads()[0], x.hidden[0], x.heads()[1], None, Weights())

    def test_unequal_rows(self):
        x = case()
        p, q = x.heads()
        with pytest.raises(ValueError, match="as many rows of p and of q"):
            linear_loss.__wrapped__(x.hidden[0], p, x.hidden[1][:5], q, None, Weights())

    def test_tokens_outside(self):
        x = case()
        x.tokens = x.tokens.clone()
        x.tokens[3] = -100
        with pytest.raises(ValueError, match="leave padding out"):
            linear_loss(*x.arguments(), Weights())

    def test_logits_that_are_nan(self):
        x = case(grads="")
        x.hidden[0][2] = torch.nan
        with pytest.raises(ValueError, match="finite or -inf"):
            linear_loss(*x.arguments(), Weights())
