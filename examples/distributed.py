"""A language model distilled on several ranks: FSDP2 for its blocks, a head whose vocabulary is divided, and no logits.

    python examples/distributed.py                                 # starts two ranks here
    torchrun --nproc-per-node 4 examples/distributed.py --tp 2     # data parallel times tensor parallel

The blocks of the student are in shards on all ranks (FSDP2). Its head and the teacher's are column-parallel: each rank
of a tensor-parallel group has some rows of their weights, and `linear_generalized_jsd_loss(vocab_group=...)` exchanges
a few numbers a token between them; over the data-parallel groups FSDP2 shards these slices once more. Beside that
every rank trains the same model alone, on the batches of all, and the two curves are printed: they are the same.

On GPUs each rank takes one (nccl), elsewhere the CPU (gloo).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from common import Table, argument_parser, farewell, plt, print_table, save_picture, start
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastgen import linear_generalized_jsd_loss

VOCABULARY, LENGTH, WIDTH, LAYERS, BETA = 256, 24, 32, 2, 0.5
BATCH = 4  # sequences of a data-parallel rank


class Blocks(nn.Module):
    """A causal transformer up to its last hidden states."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.norm(x)


class Model(nn.Module):
    """`rows`: which rows of the whole head's weight are here."""

    def __init__(self, width: int, layers: int, rows: slice = slice(None)) -> None:
        super().__init__()
        self.body = Blocks(width, layers)
        whole = nn.Linear(width, VOCABULARY, bias=False)
        self.head = nn.Linear(width, len(range(VOCABULARY)[rows]), bias=False)
        with torch.no_grad():
            self.head.weight.copy_(whole.weight[rows])


def batches(steps: int, ranks: int, device: torch.device) -> Tensor:
    """[steps, ranks, BATCH, LENGTH]: walks whose next token is near the last one."""
    generator = torch.Generator().manual_seed(1)
    strides = torch.randint(-3, 4, (steps, ranks, BATCH, LENGTH), generator=generator)
    return (strides.cumsum(-1) + 128).to(device) % VOCABULARY


def loss_of(student: Model, teacher: Model, tokens: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    with torch.no_grad():
        target = teacher.body(tokens)
    hidden = student.body(tokens)
    return linear_generalized_jsd_loss(
        hidden, student.head.weight, target, teacher.head.weight, beta=BETA, vocab_group=group
    )


def optimizer_of(model: Model) -> torch.optim.Optimizer:
    # One by one: the body's shards and the head's lie on different meshes.
    return torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)


def train(steps: int, tp: int, device: torch.device) -> tuple[list[float], list[float]]:
    """The losses of the ranks together, and of one rank alone."""
    world = dist.get_world_size()
    if world % tp:
        raise SystemExit(f"--tp {tp} does not divide the {world} ranks")
    mesh = init_device_mesh(device.type, (world // tp, tp), mesh_dim_names=("dp", "tp"))
    everyone, group = init_device_mesh(device.type, (world,)), mesh.get_group("tp")
    each = VOCABULARY // tp
    own = slice(mesh.get_local_rank("tp") * each, (mesh.get_local_rank("tp") + 1) * each)

    def made(seed: int, layers: int, rows: slice) -> Model:
        torch.manual_seed(seed)  # all ranks, and both ways, begin alike
        return Model(WIDTH, layers, rows).to(device)

    student, teacher = made(0, LAYERS, own), made(2, LAYERS + 1, own).requires_grad_(False)
    for layer in student.body.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(student.body, mesh=everyone)
    fully_shard(student.head, mesh=mesh["dp"])
    alone, whole_teacher = made(0, LAYERS, slice(None)), made(2, LAYERS + 1, slice(None)).requires_grad_(False)

    data, rank = batches(steps, world // tp, device), mesh.get_local_rank("dp")
    optimizer, optimizer_alone = optimizer_of(student), optimizer_of(alone)
    together, by_one = [], []
    for step in range(steps):
        # Batches are alike in size, and FSDP2 takes the mean over ranks: that of all tokens.
        loss = loss_of(student, teacher, data[step, rank], group)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)  # of a tensor-parallel group all have the same
        together.append(float(mean))

        loss = loss_of(alone, whole_teacher, data[step].flatten(0, 1), None)
        loss.backward()
        optimizer_alone.step()
        optimizer_alone.zero_grad()
        by_one.append(float(loss.detach()))
    return together, by_one


def table_of(together: list[float], alone: list[float]) -> Table:
    steps = sorted({0, *range(4, len(alone), 5), len(alone) - 1})
    rows = {f"step {i + 1}": {"together": together[i], "alone": alone[i]} for i in steps}
    for row in rows.values():
        row["difference"] = abs(row["together"] - row["alone"])
    return rows


def main(argv: list[str] | None = None) -> Table:
    """Run the demo; return the table as {row: {column: number}}."""
    parser = argument_parser("Distil a language model on several ranks.")
    parser.add_argument("--tp", type=int, help="ranks that divide the vocabulary (default: all)")
    args = start(parser, argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found = args.out / "distributed.json"
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
        subprocess.run([*command, *(sys.argv[1:] if argv is None else argv)], check=True)
        table: Table = json.loads(found.read_text())
        found.unlink()
        return table
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    world = dist.get_world_size()
    tp = args.tp or world
    curves = train(3 if args.smoke else 40, tp, device)
    table = table_of(*curves)
    if dist.get_rank() == 0:
        print_table(f"loss on {world} ranks: vocabulary over {tp}, batches over {world // tp}", table)
        fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
        for curve, name, style in zip(curves, (f"{world} ranks", "one rank"), ("-", ":"), strict=True):
            ax.plot(range(1, len(curve) + 1), curve, style, linewidth=3, label=name)
        ax.set(xlabel="step", ylabel="generalized JSD, nats a token")
        ax.legend()
        picture = args.out / "distributed.png"
        save_picture(fig, picture)
        found.write_text(json.dumps(table))
        farewell(args, picture)
    dist.destroy_process_group()
    return table


if __name__ == "__main__":
    main()
