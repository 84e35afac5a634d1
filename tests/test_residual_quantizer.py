"""Contracts of the tree of codebooks: a brute-force walk, lucidrains' flat case, the closed form of the EMA, restarts, processes, one clear error each."""
import copy
import math
import os
import subprocess
import sys

import pytest
import torch

from fvlm.blocks.residual_quantizer import BOOKS, HierarchicalResidualQuantizer, agree_on_proposals, level_usage, nearest_in_books, num_books
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator


def draw(*shape, stream="x"):
    return torch.randn(*shape, generator=generator(0, stream))


def made(books="path", dim=6, num_codes=4, num_levels=3, **settings):
    "A quantiser with codewords of unit size, in eval mode."
    quantizer = HierarchicalResidualQuantizer(dim, num_codes, num_levels, books=books, **{"kmeans_steps": 0, **settings})
    quantizer.codebooks.copy_(draw(*quantizer.codebooks.shape, stream="codebooks"))
    return quantizer.eval()


def offset(quantizer, level):
    return sum(quantizer.num_codes * num_books(quantizer.books, quantizer.num_codes, i) for i in range(level))


def walk(quantizer, vector):
    "(codes, codewords) by walking down the tree, the book found by the definition."
    codes, words, left = [], [], vector
    for level in range(quantizer.num_levels):
        book = {"shared": 0, "code": codes[-1] if codes else 0, "path": sum(c * quantizer.num_codes ** (level - 1 - i) for i, c in enumerate(codes))}[quantizer.books]
        first = offset(quantizer, level) + book * quantizer.num_codes
        active = quantizer.codebooks[first:first + quantizer.num_codes]
        codes.append(int((active - left).square().sum(1).argmin()))
        words.append(active[codes[-1]])
        left = left - words[-1]
    return codes, words


@pytest.fixture(params=BOOKS)
def books(request):
    return request.param


# --- the walk --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [1, 2, 4])
def test_indices_are_those_of_a_brute_force_walk(books, levels):
    quantizer = made(books, num_levels=levels).double()
    x = draw(3, 50, 6).double() * 1.5
    out = quantizer(x)
    assert out.indices.shape == (3, 50, levels) and out.indices.dtype == torch.int64 and out.quantized.shape == x.shape
    for vector, codes, quantized in zip(x.view(-1, 6), out.indices.view(-1, levels), out.quantized.view(-1, 6)):
        found, words = walk(quantizer, vector)
        assert codes.tolist() == found
        assert torch.equal(sum(words[1:], words[0]), quantized)


def test_sum_of_levels_is_quantized_is_lookup_bit_for_bit(books):
    quantizer, x = made(books), draw(4, 5, 7, 6)
    for x in (x, x.to(torch.bfloat16), x.double()):
        out = quantizer(x)
        words = quantizer.codewords(out.indices).unbind(-2)
        assert out.quantized.dtype == x.dtype
        assert torch.equal(out.quantized, (words[0] + words[1] + words[2]).to(x.dtype))
        assert torch.equal(out.quantized, quantizer.lookup(out.indices).to(x.dtype))
    assert torch.equal(quantizer.lookup(out.indices[..., :2]), words[0] + words[1])


def test_permuting_one_child_book_changes_only_what_is_routed_there():
    quantizer, x = made("path"), draw(400, 6)
    before = quantizer(x)
    other = copy.deepcopy(quantizer)
    first = offset(other, 2) + (2 * 4 + 1) * 4  # the book below codes 2, 1
    permutation = torch.tensor([3, 0, 1, 2])
    other.codebooks[first:first + 4] = quantizer.codebooks[first:first + 4][permutation]
    after = other(x)
    here = (before.indices[:, :2] == torch.tensor([2, 1])).all(1)
    assert 0 < here.sum() < len(x)
    assert torch.equal(after.indices[~here], before.indices[~here])
    assert torch.equal(permutation[after.indices[here, 2]], before.indices[here, 2]) and torch.equal(after.quantized, before.quantized)


def test_books_named_by_code_and_by_path_agree_for_two_levels_and_differ_at_three():
    path, code, x = made("path", num_levels=2), made("code", num_levels=2), draw(300, 6)
    assert torch.equal(path(x).indices, code(x).indices)
    path, code = made("path"), made("code")
    assert len(code.codebooks) == 4 + 16 + 16 and len(path.codebooks) == 4 + 16 + 64
    assert not torch.equal(path(x).indices[:, 2], code(x).indices[:, 2])


def test_the_active_book_is_the_one_the_next_code_indexes(books):
    quantizer, x = made(books), draw(30, 6)
    indices = quantizer(x).indices
    for level in range(3):
        active = quantizer.active_book(indices[:, :level])
        assert active.shape == (30, 4, 6)
        assert torch.equal(active[torch.arange(30), indices[:, level]], quantizer.codewords(indices)[:, level])
    with pytest.raises(ShapeError, match="no book after the last"):
        quantizer.active_book(indices)


@pytest.mark.parametrize("tile", [1, 5, 32, 1000])
def test_tiles_of_any_size_find_the_same(tile):
    vectors, codebooks, book = draw(200, 5), draw(12, 3, 5, stream="books"), torch.randint(11, (200,), generator=generator(0, "book"))
    book[book == 4] = 7  # an empty book in the middle, one at the end
    expected = torch.stack([(codebooks[b] - v).square().sum(1).argmin() for v, b in zip(vectors, book)])
    assert torch.equal(nearest_in_books(vectors, book, codebooks, tile), expected)


def test_of_equals_the_first_is_taken(books):
    quantizer = made(books)
    quantizer.codebooks.zero_()
    assert not quantizer(draw(70, 6)).indices.any()


# --- lucidrains ------------------------------------------------------------------------------------------------------

def lucidrains(quantizer, **settings):
    library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is in the extra `bench`")
    theirs = library.ResidualVQ(dim=quantizer.dim, codebook_size=quantizer.num_codes, num_quantizers=quantizer.num_levels, commitment_weight=quantizer.commitment_weight, decay=quantizer.decay, **settings)
    for level, layer in enumerate(theirs.layers):
        layer._codebook.embed.copy_(quantizer._book(level))
        layer._codebook.embed_avg.copy_(quantizer._book(level))
    return theirs


@pytest.mark.parametrize("levels", [1, 4])
def test_the_flat_case_is_lucidrains_residual_vq(levels):
    quantizer = made("shared", dim=16, num_codes=32, num_levels=levels)
    theirs, x = lucidrains(quantizer).eval(), draw(4, 100, 16)
    quantized, indices, _ = theirs(x)
    out = quantizer(x)
    assert torch.equal(out.indices, indices)
    assert torch.allclose(out.quantized, quantized, atol=1e-6)


def test_the_flat_training_step_is_lucidrains():
    quantizer = made("shared", dim=16, num_codes=8, count_total=False, decay=0.8, restart_below=None).train()
    quantizer.counts.fill_(1)
    theirs, x = lucidrains(quantizer, threshold_ema_dead_code=0, rotation_trick=False).train(), draw(4, 100, 16).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out, (quantized, indices, losses) = quantizer(x), theirs(y)
    assert torch.equal(out.indices, indices) and torch.allclose(out.loss, losses.sum(), rtol=1e-5)
    (ours,), (others,) = torch.autograd.grad(out.loss, x), torch.autograd.grad(losses.sum(), y, retain_graph=True)
    assert torch.allclose(ours, others, atol=1e-7)
    (through,) = torch.autograd.grad(quantized.sum(), y)
    assert torch.equal(through, torch.full_like(x, 3.0)), "theirs is straight-through at each of three levels: three times the identity, where ours is once"
    for level, layer in enumerate(theirs.layers):  # theirs smooths the counts by 1e-5
        assert torch.allclose(quantizer._book(level), layer._codebook.embed, atol=1e-4)


# --- learning --------------------------------------------------------------------------------------------------------

def test_a_training_step_is_the_closed_form_of_two_running_sums(books):
    quantizer = made(books, decay=0.9, restart_below=None).double().train()
    quantizer.counts.copy_(draw(len(quantizer.counts), stream="counts").abs() + 0.1)
    counts, sums = quantizer.counts.clone(), quantizer.counts.unsqueeze(1) * quantizer.codebooks
    before = quantizer.codebooks.clone()
    x = draw(60, 6).double()
    here, here_sums = torch.zeros_like(counts), torch.zeros_like(sums)
    for vector in x:
        left, rows = vector, quantizer._rows(torch.tensor(walk(quantizer, vector)[0]))
        for row in rows:
            here[row] += 1
            here_sums[row] += left
            left = left - before[row]
    visited = here.view(-1, 4).any(1).repeat_interleave(4)  # a book's clock ticks when something is routed to it
    counts = torch.where(visited, 0.9 * counts + 0.1 * here, counts)
    sums = torch.where(visited.unsqueeze(1), 0.9 * sums + 0.1 * here_sums, sums)
    quantizer(x)
    assert torch.allclose(quantizer.counts, counts) and torch.allclose(quantizer.codebooks, sums / counts.unsqueeze(1))
    assert torch.equal(quantizer.codebooks[here == 0], before[here == 0])


def test_eval_mode_changes_nothing_and_training_does(books):
    quantizer, x = made(books, kmeans_steps=3), draw(50, 6)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(x)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    quantizer.train()(x)
    assert bool(quantizer.initialised) and not torch.equal(quantizer.codebooks, before["codebooks"])


def test_error_falls_with_levels_and_the_tree_beats_flat():
    x, errors = draw(4000, 6) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.5]), {}
    for books in ("path", "shared"):
        quantizer = HierarchicalResidualQuantizer(6, 4, 3, books=books)
        for step in range(30):
            quantizer(x)
        codes = quantizer.eval()(x).indices
        errors[books] = [float((x - quantizer.lookup(codes[:, :k])).square().mean()) for k in (1, 2, 3)]
        assert errors[books] == sorted(errors[books], reverse=True)
    assert errors["path"][2] < 0.95 * errors["shared"][2]


def test_k_means_puts_codewords_at_cluster_means():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    x = centres.repeat(50, 1) + 0.1 * draw(200, 2)
    quantizer = HierarchicalResidualQuantizer(2, 4, 1).initialise(x)
    means = torch.stack([x[i::4].mean(0) for i in range(4)])
    nearest = torch.cdist(means, quantizer.codebooks).min(1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3] and nearest.values.max() < 1e-5
    assert torch.equal(quantizer.counts, torch.full((4,), 50.0))


def test_every_codeword_out_of_reach_comes_back(books):
    quantizer = made(books, decay=0.9).train()
    quantizer.codebooks.view(-1, 4, 6)[:, 1:] += 1e3
    for step in range(80):
        out = quantizer(draw(600, 6, stream=f"step {step}"))
    used = quantizer.usage(out.indices)
    assert all(level.books_used == level.books for level in used) and sum(level.codes_used for level in used) > 0.8 * len(quantizer.codebooks)
    assert float(quantizer.codebooks.abs().max()) < 10


def test_restarts_land_on_different_vectors_of_their_own_book():
    quantizer = made("path", num_levels=2, decay=0.5).train()
    quantizer.codebooks[4:] = 1e3  # every child is out of reach, the parents are not
    parents = quantizer.codebooks[:4].clone()
    x = draw(400, 6)
    route = torch.cdist(x, parents).argmin(1)
    quantizer(x)
    for book in range(4):
        residuals = (x - parents[route])[route == book]
        children = quantizer._book(1)[book]
        on_vectors = ((children.unsqueeze(1) - residuals).abs().amax(2) < 1e-6 * 1e3).any(1)  # left + word, at a word of 1e3
        assert children.abs().max() < 100 and on_vectors.tolist() == [False, True, True, True]  # the first of equals took them all, and is their mean
        assert len(children.unique(dim=0)) == 4


def test_a_rare_parent_keeps_its_children():
    "One vector in a hundred goes to the second parent, and for a while none: its children keep their places, without a single restart."
    quantizer = HierarchicalResidualQuantizer(2, 2, 2, restart_below=0.01)
    common, rare = draw(792, 2), 0.01 * draw(8, 2, stream="rare") + torch.tensor([[50.0, 49], [50, 51]]).repeat(4, 1)
    x = torch.cat([common, rare])
    quantizer(x)
    rounds = int(quantizer.restarts)
    for _ in range(50):
        quantizer(x)
    for _ in range(50):
        quantizer(common)  # the rare parent sleeps, and is not forgotten
    error = (quantizer.eval()(rare).quantized - rare).abs().max()
    assert error < 0.05 and int(quantizer.restarts) == rounds


def test_where_vectors_are_fewer_than_dead_codewords_the_rest_wait():
    quantizer = made("path", num_levels=2)
    before, x = quantizer.codebooks.clone(), draw(2, 6)
    quantizer.initialise(x)
    moved = (quantizer.codebooks != before).any(1).view(-1, 4).sum(1)
    assert moved[0] == 2 and sorted(moved[1:].tolist()) == [0, 0, 1, 1]
    assert torch.allclose(quantizer(x).quantized, x, atol=1e-6)


def test_a_book_nobody_visits_asks_for_no_restart():
    quantizer = made("path", num_codes=2, dim=1, num_levels=2).train()
    quantizer.codebooks[:4] = torch.tensor([[0.0], [10.0], [-0.5], [0.5]])
    quantizer.counts[:4] = 1.0  # the second book of level two has never been used
    for step in range(20):
        quantizer(draw(50, 1).clamp(-2, 2))
    assert int(quantizer.restarts) == 0 and not quantizer.counts[4:].any() and quantizer.counts[:1].all()


def test_books_below_a_restarted_codeword_count_from_zero():
    quantizer = made("path", num_codes=2, dim=1, num_levels=3).train()
    quantizer.counts.fill_(1)
    quantizer.codebooks[:2] = torch.tensor([[0.0], [1e3]])
    quantizer.counts[1] = 1e-6
    quantizer(draw(100, 1))
    below_second = torch.cat([quantizer.counts[2 + 2:2 + 4], quantizer.counts[6 + 4:6 + 8]])
    assert quantizer.codebooks[1].abs() < 10 and not below_second.any() and quantizer.counts[2:4].any()


def test_randomness_has_a_key_and_leaves_the_global_state_alone(books):
    def after(seed):
        quantizer = HierarchicalResidualQuantizer(6, 4, 3, books=books, seed=seed, decay=0.5)
        for step in range(5):
            quantizer(draw(40, 6, stream=f"{step}"))
        return quantizer.codebooks

    state = torch.get_rng_state()
    assert torch.equal(after(1), after(1)) and not torch.equal(after(1), after(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_state_dict_carries_on_where_it_was(books):
    first = HierarchicalResidualQuantizer(6, 4, 3, books=books, decay=0.5)
    for step in range(4):
        first(draw(40, 6, stream=f"{step}"))
    second = HierarchicalResidualQuantizer(6, 4, 3, books=books, decay=0.5, seed=0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(4, 9):
        x = draw(40, 6, stream=f"{step}")
        assert torch.equal(first(x).indices, second(x).indices)
    assert int(first.restarts) > 0 and all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("x", [torch.zeros(40, 6), torch.ones(40, 6), torch.full((1, 6), 3.0), 1e-30 * torch.ones(9, 6), 1e6 * draw(30, 6)], ids=["zeros", "ones", "one", "tiny", "large"])
def test_never_nan(books, x):
    quantizer = HierarchicalResidualQuantizer(6, 4, 3, books=books)
    for _ in range(30):
        out = quantizer(x)
    assert all(torch.isfinite(value).all() for value in (out.quantized, out.loss, *quantizer.state_dict().values()))
    assert float((quantizer.eval()(x).quantized - x).abs().max()) <= (1e-5 if len(x.unique(dim=0)) == 1 else 1.5e6)


# --- gradients -------------------------------------------------------------------------------------------------------

def test_straight_through_is_the_identity_bit_for_bit(books):
    quantizer, x, upstream = made(books), draw(3, 7, 6).requires_grad_(), draw(3, 7, 6, stream="upstream")
    out = quantizer(x)
    (gradient,) = torch.autograd.grad(out.quantized, x, upstream)
    assert torch.equal(gradient, upstream) and torch.equal(out.quantized, quantizer.lookup(out.indices))
    assert not out.indices.requires_grad and not any(p.requires_grad for p in quantizer.parameters())


@pytest.mark.parametrize("count_total", [True, False])
@pytest.mark.parametrize("levels", [1, 3])
def test_the_loss_is_eq_4_and_pulls_from_every_level(books, count_total, levels):
    quantizer, x = made(books, num_levels=levels, commitment_weight=0.3, count_total=count_total).double(), draw(20, 6).double().requires_grad_()
    out = quantizer(x)
    words, terms, left = quantizer.codewords(out.indices), [], x
    for level in range(levels):
        terms.append((words[:, level] - left).square().mean())
        left = left - words[:, level]
    if count_total:
        terms.append((words.sum(1) - x).square().mean())
    plain = 0.3 * sum(terms)
    assert torch.allclose(out.loss, plain)
    assert torch.allclose(*(torch.autograd.grad(loss, x)[0] for loss in (out.loss, plain)))


def test_gradients_reach_an_encoder_under_bf16_autocast():
    encoder, quantizer = torch.nn.Linear(6, 6), made("path").train()
    many = draw(5000, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = made("path")(many).indices
        z = encoder(draw(50, 6))
        out = quantizer(z)
        loss = out.quantized.float().square().mean() + out.loss
    loss.backward()
    assert z.dtype == out.quantized.dtype == torch.bfloat16 and out.loss.dtype == torch.float32 and encoder.weight.grad.abs().sum() > 0
    assert torch.equal(inside, made("path")(many).indices), "autocast must not reach the search"


def test_no_gradient_is_prepared_where_none_is_asked():
    quantizer, x = made("path"), draw(20, 6)
    assert not quantizer(x).quantized.requires_grad
    with torch.no_grad():
        assert not quantizer(x.requires_grad_()).loss.requires_grad


# --- usage -----------------------------------------------------------------------------------------------------------

def test_usage_counts_what_was_chosen():
    quantizer = made("path", num_codes=2, num_levels=2)
    first, second = quantizer.usage(torch.tensor([[0, 0], [0, 1], [0, 0], [0, 1]]))
    assert (first.codes_used, first.books_used, first.codes) == (1, 1, 2) and first.perplexity == 1
    assert (second.codes_used, second.books_used, second.books, second.codes) == (2, 1, 2, 4) and math.isclose(second.perplexity_in_book, 2)
    nothing = level_usage(0, torch.zeros(1, 4))
    assert (nothing.codes_used, nothing.perplexity) == (0, 1)
    assert len(quantizer.train().usage()) == 2


# --- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("x, error, says", [
    (torch.zeros(4, 5), ShapeError, "x: axis D should be 6, got 5"),
    (torch.zeros(0, 6), InputError, "at least one vector"),
    (torch.zeros(4, 6, dtype=torch.long), InputError, "floating point"),
    ([[0.0] * 6], InputError, "x: got list"),
    (torch.tensor([[0.0] * 5 + [float("nan")]]), NonFiniteError, "x: 1 of 6 values"),
    (torch.tensor([[0.0] * 5 + [float("-inf")]]), NonFiniteError, "x: 1 of 6 values"),
])
@pytest.mark.parametrize("training", [True, False])
def test_bad_vectors(x, error, says, training):
    quantizer = made().train(training)
    before = quantizer.codebooks.clone()
    with pytest.raises(error, match=says):
        quantizer(x)
    assert torch.equal(quantizer.codebooks, before)


@pytest.mark.parametrize("indices, error, says", [
    (torch.tensor([0, 4, 0]), InputError, "codes from 0 to 4, expected 0 to 3"),
    (torch.tensor([0, -1, 0]), InputError, "codes from -1 to 0"),
    (torch.zeros(2, 4, dtype=torch.long), ShapeError, "1 to 3 levels"),
    (torch.zeros(2, 0, dtype=torch.long), ShapeError, "1 to 3 levels"),
    (torch.tensor(1), ShapeError, "1 to 3 levels"),
    (torch.zeros(2, 3), InputError, "torch.float32, expected a tensor of whole numbers"),
    ([0, 1], InputError, "got list"),
])
def test_bad_indices(books, indices, error, says):
    quantizer = made(books)
    for use in (quantizer.lookup, quantizer.codewords, quantizer.usage):
        with pytest.raises(error, match=says):
            use(indices)


@pytest.mark.parametrize("settings, says", [
    (dict(dim=0), "dim: got 0"), (dict(num_codes=0), "num_codes"), (dict(num_levels=0), "num_levels"), (dict(books="paths"), "did you mean 'path'"),
    (dict(decay=1.0), "decay: got 1"), (dict(decay=-0.1), "decay"), (dict(commitment_weight=-1), "commitment_weight"),
    (dict(restart_below=0.9), "restart_below"), (dict(kmeans_steps=-1), "kmeans_steps"), (dict(num_codes=512, num_levels=4), "keeps 134,480,384 codewords"),
])
def test_bad_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        HierarchicalResidualQuantizer(**{"dim": 4, "num_codes": 4, **settings})


def test_half_precision_codebooks_serve_and_do_not_learn():
    quantizer, x = made("path").to(torch.bfloat16), draw(30, 6).to(torch.bfloat16)
    out = quantizer(x)
    assert out.quantized.dtype == torch.bfloat16 and torch.isfinite(out.quantized).all()
    with pytest.raises(InputError, match="codebooks: got torch.bfloat16 in training mode"):
        quantizer.train()(x)


# --- two processes ---------------------------------------------------------------------------------------------------

def halves(step, rank=None):
    "Odd shares of one batch."
    x = draw(90, 4, stream=f"shared {step}") * torch.tensor([4.0, 2, 1, 1])
    return x if rank is None else (x[:50], x[50:])[rank]


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    plain = made("path", dim=4, restart_below=None, decay=0.8).train()
    restless = HierarchicalResidualQuantizer(4, 4, 3, decay=0.5)
    for step in range(6):
        plain(halves(step, rank))
        restless(halves(step, rank))
    mine = torch.tensor([[True, True, False, False], [True, False, True, False]])[rank]
    agreed = [agree_on_proposals(torch.full((4, 2), 10.0 + rank), mine, turn) for turn in (0, 1)]
    torch.save({"agreed": agreed, "plain": plain.state_dict(), "restless": restless.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_one_tree(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    try:
        for process in both:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in both:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for turn, (proposal, fits) in enumerate(first["agreed"]):
        assert fits.tolist() == [True, True, True, False] and proposal[:3, 0].tolist() == [10.0 + turn, 10, 11]
        assert torch.equal(proposal, second["agreed"][turn][0]) and torch.equal(fits, second["agreed"][turn][1])
    for arm in ("plain", "restless"):
        assert all(torch.equal(first[arm][name], second[arm][name]) for name in first[arm]), arm
    assert int(first["restless"]["restarts"]) > 10 and torch.isfinite(first["restless"]["codebooks"]).all()
    alone = made("path", dim=4, restart_below=None, decay=0.8).train()
    for step in range(6):
        alone(halves(step))
    assert torch.allclose(first["plain"]["codebooks"], alone.codebooks, atol=1e-5) and torch.allclose(first["plain"]["counts"], alone.counts, atol=1e-5)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), sys.argv[2])
