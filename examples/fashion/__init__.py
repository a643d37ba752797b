"""The methods on real images: Fashion-MNIST, 28x28, against its test split, each beside its control, over three seeds.

    python examples/fashion                 # all of them, as `make fashion`; writes the page
    python examples/fashion page ddo dmd    # some; the page keeps the others
    python examples/fashion ddo --seeds 1   # one, with its options; leaves the page alone
    python examples/fashion base --out run  # trains the base anew (its weights are here, so nothing needs to)

The data come from the Debian package `dataset-fashion-mnist`, from torchvision, or from a folder that the environment
variable FASHION_MNIST names (`data.py`).
"""
