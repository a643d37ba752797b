"""Direct Discriminative Optimization (arXiv 2503.01103) of a diffusion model, at full length.

    accelerate launch -m examples.train_ddo --model ddpm-cifar10-32/ --data images/ --out run
    torchrun --nproc-per-node 8 -m examples.train_ddo --model my_networks:edm_cifar10 --data images.npz --out run
    python -m examples.train_ddo --model my_networks:tiny --data random --out /tmp/run   # one process, made-up images

All from the repository's root; on CPUs `accelerate launch` starts one process, and torchrun several.

A *round* of self-play starts from a reference, which stays frozen. Its samples are the fakes, cached on disk. The
model, a copy of it, is trained by `fastgen.ddo_loss` on real images and fakes that share noise levels and noise. The
average of its weights that scores best against validation images is the next round's reference, or the reference stays
where none scores better than it. Networks are denoisers in EDM's sense, D(x; σ); a `UNet2DModel` of diffusers becomes
one by a change of variables.

**No preset was ever run**, neither cifar10 nor imagenet64 nor imagenet512: they are a table of what is known of the
paper's settings, and what is not in it has to be given on the command line. No result on these data is claimed. Nor did
any of this run on a GPU yet: what its tests cover is tiny networks on CPUs, on one rank and on two. `--metric fid` was
tried with Inception of random weights alone.

It needs accelerate; a `UNet2DModel` needs diffusers, a folder of images Pillow, `--metric fid` torch-fidelity and its
weights. TensorBoard is written where it is installed. Only DDP is supported: FSDP2 is not done, and FSDP and DeepSpeed,
which shard the weights that are averaged and compared here, are refused.

Killed at any point, the same command goes on from the last checkpoint, with as many ranks, and ends at the weights of a
run that was not killed, to the bit where the network's kernels are deterministic, as on CPUs: a file takes its place by
a rename, and nothing is drawn that the seed and the checkpoint do not determine. More `--rounds` go on from the end. In
`--out`, which all ranks must see:

    settings.json             what the run was started with; another command there is refused
    state.pt                  the checkpoint: weights, their average, the optimizer, round, step, random states
    round-K/reference.pt      the reference of round K
    round-K/fakes-NNNNN.npy   its samples, in chunks; one that is there is not drawn again; of no use after the round
    round-K/best.pt           the weights of the best score so far, averaged ones or the reference's
    model/ or model.pt        at the end: what was best in the last round, for `UNet2DModel.from_pretrained` or as a
                              state dict
"""
