"""What the paper's figures show and say, where it gives curves and bars without numbers.

Nothing here is read off a picture. The statements are the paper's, in our words; settings are by its captions.
"""

# Figure 4 (section 4.3): the numbers of JFT-300M's images that networks were pre-trained on.
FIGURE_4_IMAGES = (9_000_000, 30_000_000, 90_000_000, 303_000_000)
# Pairs of which the text says that the first is much worse with 9M images, and better with 90M and more.
FIGURE_4_PAIRS = (("ViT-B/32", "R50x1"), ("ViT-L/16", "R152x2"))

# Figure 8 (appendix D.2): the model from which one dimension at a time is changed.
FIGURE_8_BASE = {"num_layers": 8, "hidden_dim": 1024, "mlp_dim": 2048, "patch_size": 32}

# Figure 9 (appendix D.3): pooling and learning rate of its three curves, over 7 epochs.
FIGURE_9_CURVES = (("cls", 8e-4), ("gap", 8e-4), ("gap", 3e-4))

STATEMENTS = {
    "figure_2": "ViT-H/14 is ahead of BiT-L and of the other methods on natural and structured tasks; on specialized "
    "tasks it and BiT-L are similar",
    "figure_3": "pre-trained on ImageNet, the large ViTs are below the base ones and below BiT; on ImageNet-21k they "
    "are similar; on JFT-300M the largest are ahead",
    "figure_4": "with 9M images ViT-B/32 is much worse than R50x1, and with 90M and more it is better; so are L/16 and "
    "R152x2; ResNets reach their plateau sooner",
    "figure_5": "at the same compute ViT is ahead of ResNets, by a factor of 2 to 4 in compute; hybrids are ahead of "
    "ViT at small compute only; nothing saturates",
    "figure_8": "depth helps most, clearly up to 64 layers but less after 16; width changes least; smaller patches "
    "help without more parameters; all dimensions in proportion help robustly",
    "figure_9": "global average pooling is as good as the class token, but needs another learning rate",
    "figure_13": "both Axial-ViTs are better than the ViTs of their patch size and cost more; AxialResNet looks "
    "reasonable by FLOPs and is extremely slow on TPUs",
    "masked_patches": "after masked patch prediction, ViT-B/16 reaches 79.9 % on ImageNet, 2 points more than from "
    "scratch and 4 less than after supervised pre-training; L2 on pixels and 15 % corruption are slightly worse",
    "table_7": "Adam is better than SGD on most data sets and on average",
    "table_8": "any position embedding is far better than none; how it is encoded and where it is added matters little",
}
