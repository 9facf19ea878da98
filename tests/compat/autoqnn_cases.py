"""Every example and notebook of AutoQNN about quantization: whether it runs here, and why not, with its test."""

from __future__ import annotations

from tests.compat.coming_from import Row

NOTEBOOKS = ("Demo.ipynb", "Cifar10.ipynb", "AutoESB.ipynb", "DNN-Analysis.ipynb")
DOCSTRINGS = ("binary.py", "ternary.py", "ul2q.py", "vecq.py", "clipq.py", "zoomq.py", "potq.py", "resq.py")
"""Files of its quantizers whose last string is an example."""

_WHY = {
    "binary.py": "weights are equal; 0 of an activation becomes +alpha, there it stays 0",
    "ternary.py": "equal, but on a tensor of zeros, which gives NaN there (docs/algorithms.md I-18)",
    "ul2q.py": "there half a step is lost (docs/algorithms.md I-11)",
    "vecq.py": "values of a weight by least squares, there by norms (docs/algorithms.md I-12)",
    "clipq.py": "the optimal step in all digits; the gradient is clipped for this tensor (docs/algorithms.md I-19)",
    "zoomq.py": "equal to 1e-5 of the range; values beyond it take the outermost level",
    "potq.py": "there level 1 is missing (docs/algorithms.md I-15); 8 bits become 4 in both, here with a warning",
    "resq.py": "a value takes the nearest level, and evaluation uses the right numbers (docs/algorithms.md I-16)",
}
"""File -> what is computed otherwise here."""

ROWS: list[Row] = [
    Row("README.md, usage", "convert with fixed point, 4 bits", "runs", "", "test_block_of_the_readme"),
    Row("README.md, ESB", "convert with ESB(4, 1)", "runs", "", "test_block_of_the_readme"),
    Row(
        "README.md, figure",
        "histogram of a weight before and after",
        "differs",
        "here with scheme, bits and levels; there by a script that is not published",
        "test_histograms_show_scheme_bits_and_levels",
    ),
    Row(
        "README.md, own quantizers",
        "a subclass of Quantization",
        "runs",
        "",
        "test_a_quantizer_of_the_user_is_converted_and_trains",
    ),
    Row("Demo.ipynb", "convert a net, print it, view it as a Digraph", "runs", "", "test_demo_notebook"),
    Row(
        "Demo.ipynb, Net.png",
        "a picture that view_module writes into the current folder",
        "differs",
        "only save_path writes a file, and all edges are kept, not one for each node",
        "test_the_graph_is_a_digraph_of_graphviz",
    ),
    Row(
        "Cifar10.ipynb",
        "train and validate vgg7_64, vgg7_64_plane, ResNet14, ResNet18 on CIFAR-10, keep weights and curves",
        "differs",
        "what is missing is downloaded with download=True only; augmentation is torchvision's AutoAugment; "
        "the model's device counts, not cuda",
        "test_cifar10_notebook",
    ),
    Row(
        "AutoESB.ipynb",
        "imports and the heading of a search over ESB, no code",
        "differs",
        "here ESB learns its width",
        "test_autoesb_notebook",
    ),
    Row(
        "DNN-Analysis.ipynb",
        "multiply-adds, parameters and memory of 21 nets of torchvision, rooflines",
        "differs",
        "multiply-adds of layers and products: thop adds norms and pooling, up to 6 % more; outputs are counted once, "
        "not again for each enclosing module",
        "test_multiply_adds_of_the_21_nets",
    ),
    Row(
        "DNN-Analysis.ipynb, roofline",
        "attainable performance, time and energy on devices",
        "runs",
        "",
        "test_dnn_analysis_notebook",
    ),
    *(
        Row(
            f"quantizers/{name}",
            "convert convolutions, train and validate on a batch, draw what quantizers do",
            "differs",
            _WHY[name],
            "test_example_of_a_quantizer",
        )
        for name in DOCSTRINGS
    ),
    Row("quantizers/fixedq.py, esb.py", "no example; both classes", "runs", "", "test_block_of_the_readme"),
    Row("utils/module_utils.py", "view a net with a batch norm", "runs", "", "test_demo_notebook"),
    Row(
        "utils/statics_utils.py",
        "count AlexNet; sparsity; records of modules",
        "runs",
        "",
        "test_counts_and_roofline",
    ),
    Row("datasets/cifar.py", "loaders of CIFAR-10 and CIFAR-100", "runs", "", "test_cifar_from_its_files"),
    Row("datasets/imagenet.py", "loaders of ImageNet", "runs", "", "test_imagenet_from_its_folders"),
    Row(
        "datasets/autoaugment.py",
        "policies of CIFAR-10, ImageNet, SVHN",
        "differs",
        "they are torchvision's",
        "test_policies_are_torchvisions",
    ),
    Row(
        "datasets/tfrecord_read.py",
        "ImageNet from TFRecord files",
        "refused",
        "its names are missing from its own imports, so that it runs nowhere; ImageFolder of the images does the same",
        "test_what_of_autoqnn_is_refused_says_why",
    ),
    Row(
        "datasets/imagenet.py, mvVal2ValFolders",
        "sort images of val into folders",
        "differs",
        "the tables val.txt and synsets.txt lie in data_path, not at fixed paths of its authors",
        "test_images_of_val_are_sorted",
    ),
    Row(
        "utils/module_utils.py, clone_module",
        "a copy whose parameters have gradients",
        "refused",
        "it is not about quantization; torch.func.functional_call runs a model with other parameters",
        "test_what_of_autoqnn_is_refused_says_why",
    ),
    Row(
        "quantizers/quantization.py, freeze_bitwidth=False",
        "a width that is learned",
        "differs",
        "there no gradient reaches it; here it learns",
        "test_a_width_is_learned",
    ),
    Row(
        "state dicts",
        "go on here with a model that was trained there, and the other way round",
        "differs",
        "the key map says for each quantizer whether its arithmetic is the same",
        "test_autoqnn_keys_say_where_the_arithmetic_differs",
    ),
]
"""The rows of the page on moving here."""
