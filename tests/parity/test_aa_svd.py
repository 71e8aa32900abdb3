"""AA-SVD (arXiv 2604.02119): closed form of objective 4, then the block's training, against a form of its own."""

from copy import deepcopy
from math import ceil, cos, pi

import torch

from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.corrections.refine import Refine
from lowrank_kit.corrections.sequential import Sequential
from lowrank_kit.truncations.optimal import Optimal

# A truncated v would leave directions of o open, and factors that any rotation of them fits.
GROUPS = (("q_proj", "k_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PASSES, RATE, BATCH = 2, 1e-3, 3


def inputs_of(model, path, rows):
    """What a linear reads, [tokens, in] in float64."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(input_ids=rows)
    handle.remove()
    return seen[0]


def test_every_matrix_is_refitted_and_every_block_trained(model, rows, work):
    correction = Refine(residual=False, anchor=0, ridge=1e-6, passes=PASSES, learning_rate=RATE, held_out=0)
    method = {"name": "x", "ratio": 0.4, "rank_multiple": 1, "truncation": Optimal(), "allocation": Uniform()}
    method["roles"] = ("q", "k", "o", "gate", "up", "down")
    plan, compressed = work(model, TruncatedSVD(**method, correction=correction))
    found = deepcopy(model)
    batches = rows.split(BATCH)
    for number, block in enumerate(found.model.layers):
        for group in GROUPS:
            paths = [
                p for p, _ in found.named_modules() if p.startswith(f"model.layers.{number}.") and p.endswith(group)
            ]
            new = inputs_of(found, paths[0], rows)
            # Truncated matrices before it leave directions that nothing reaches.
            values, vectors = torch.linalg.eigh(new.T @ new)
            reached = values > 1e-9 * values[-1]
            whiten = vectors[:, reached] / values[reached].sqrt()
            for path in paths:
                wanted = inputs_of(model, path, rows) @ model.get_submodule(path).weight.double().T
                # min |X W^T - X' V U^T|: the truncation of (X'^+ X W^T) in the metric of X'.
                u, s, vh = torch.linalg.svd(wanted.T @ new @ whiten, full_matrices=False)
                rank = plan.ranks[path]
                product = u[:, :rank] * s[:rank] @ vh[:rank] @ whiten.T
                u, s, vh = torch.linalg.svd(product)
                up, down = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]
                layer = torch.nn.Sequential(torch.nn.Linear(*down.T.shape, False), torch.nn.Linear(*up.T.shape, False))
                layer[0].weight.data, layer[1].weight.data = down.float(), up.float()
                found.set_submodule(path, layer)
        train(model, found, number, block, batches)
    _, untrained = work(model, TruncatedSVD(**method, correction=Sequential(anchor=0, ridge=1e-6)))
    with torch.no_grad():
        ours, theirs, before = (m(input_ids=rows).logits for m in (compressed, found, untrained))
    # Adam's first steps have their full length where a gradient is rounding, too.
    assert (ours - theirs).norm() < 0.05 * (theirs - before).norm()


def train(model, found, number, block, batches):
    """The authors' ``finetune_layer``: AdamW 1e-4 (here RATE), warm-up of a tenth, cosine to a tenth, clipping at 1."""
    optimizer = torch.optim.AdamW(block.parameters(), weight_decay=0.01)
    steps = PASSES * len(batches)
    warm = ceil(steps / 10)
    for step in range(steps):
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(step // len(batches)))
        batch = batches[int(order[step % len(batches)])]
        wave = 0.1 + 0.9 * (1 + cos(pi * (step - warm) / (steps - warm))) / 2
        optimizer.param_groups[0]["lr"] = RATE * ((step + 1) / warm if step < warm else wave)
        with torch.no_grad():
            target = behind(model, number, batch)
        optimizer.zero_grad()
        (behind(found, number, batch) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        optimizer.step()


def behind(model, number, batch):
    """The hidden states behind a block, before the final norm."""
    seen = []
    handle = model.model.layers[number].register_forward_hook(
        lambda _m, _x, y: seen.append(y[0] if isinstance(y, tuple) else y)
    )
    model(input_ids=batch)
    handle.remove()
    return seen[0]
