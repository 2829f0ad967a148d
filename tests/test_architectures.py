"""A dozen architectures: products, eager and traced, against double backprop on torch's own tape in float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, randn_like, relative_error, seeded
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessfunc as hf
from hessfunc import tree


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=seeded(seed))


class Residual(nn.Module):
    """ResNet's basic block, with a projection where the shape changes."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


def resnet():
    return nn.Sequential(Residual(2, 3, 1), nn.MaxPool2d(2), Residual(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ConvNeXt(nn.Module):
    """Depthwise convolution, LayerNorm over channels, an inverted bottleneck with GELU, and a layer scale."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 2, 2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x):
        x = self.stem(x)
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return (x + (self.scale * y).permute(0, 3, 1, 2)).mean((2, 3))


class ViT(nn.Module):
    """Patches, a class token, positions, and torch's own encoder."""

    def __init__(self, width=4):
        super().__init__()
        self.patches = nn.Conv2d(2, width, 4, 4)
        self.token = nn.Parameter(torch.ones(1, 1, width) / 3)
        self.positions = nn.Parameter(torch.linspace(-1, 1, 5 * width).reshape(1, 5, width))
        layer = nn.TransformerEncoderLayer(width, 2, 6, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.encoder(x)[:, 0]


class GPT(nn.Module):
    """Pre-norm causal blocks by ``F.scaled_dot_product_attention``; the head is the embedding."""

    def __init__(self, width=4, tokens=6):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(5, width)
        self.norm1, self.norm2, self.last = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(approximate="tanh"), nn.Linear(6, width))
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(self.last(x + self.mlp(self.norm2(x)))).transpose(1, 2)


class BERT(nn.Module):
    """Post-norm blocks with segments and a padding mask, by ``nn.MultiheadAttention``."""

    def __init__(self, width=4, tokens=6):
        super().__init__()
        self.tokens, self.segments = nn.Embedding(tokens, width, padding_idx=0), nn.Embedding(2, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.pool = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, ids):
        x = self.tokens(ids) + self.segments((torch.arange(ids.shape[1]) > 2).long())
        x = self.norm1(x + self.attention(x, x, x, key_padding_mask=ids == 0, need_weights=False)[0])
        return self.pool(self.norm2(x + self.mlp(x))[:, 0])


class Llama(nn.Module):
    """Rotary embeddings in complex numbers, grouped queries, RMSNorm and SwiGLU."""

    def __init__(self, width=8, tokens=6):
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width // 2, bias=False)
        self.v, self.out = nn.Linear(width, width // 2, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up, self.down = nn.Linear(width, 6), nn.Linear(width, 6), nn.Linear(6, width)
        self.register_buffer("angles", torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1])))

    def rotate(self, x):
        turn = torch.polar(torch.ones_like(self.angles), self.angles)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def forward(self, ids):
        x = self.tokens(ids)
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (-1, 4)).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return (x + self.down(F.silu(self.gate(h)) * self.up(h))).mean(1)


class MixtureOfExperts(nn.Module):
    """Top-2 routing among four experts, gathered and scattered by index."""

    def __init__(self, width=4):
        super().__init__()
        self.router = nn.Linear(width, 4)
        self.inside = nn.Parameter(torch.linspace(-1, 1, 4 * width * 3).reshape(4, width, 3).sin())
        self.outside = nn.Parameter(torch.linspace(-2, 1, 4 * 3 * width).reshape(4, 3, width).cos())

    def forward(self, x):
        gates, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        rows = torch.arange(len(x)).repeat_interleave(2)
        hidden = torch.einsum("nd,ndh->nh", x[rows], self.inside[chosen.flatten()]).tanh()
        routed = torch.einsum("nh,nhd->nd", hidden, self.outside[chosen.flatten()])
        return torch.zeros_like(x).index_add(0, rows, gates.flatten().unsqueeze(1) * routed)


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.head = nn.LazyLinear(4)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class UNet(nn.Module):
    """One level down and up again by a transposed convolution, with the skip connection."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.SiLU())
        self.middle = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 3, 2, 2)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        skip = self.down(x)
        return self.last(torch.cat([self.up(self.middle(skip)), skip], 1)).mean((2, 3))


class GraphConvolution(nn.Module):
    """Two rounds of message passing, summed by ``scatter_add`` and averaged by ``index_add``."""

    def __init__(self):
        super().__init__()
        self.first, self.own, self.second = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 4)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 5, 5, 0]]))

    def forward(self, x):
        source, target = self.edges
        messages = self.first(x)[source]
        gathered = torch.zeros(len(x), 5, dtype=x.dtype).scatter_add(0, target.unsqueeze(1).expand(-1, 5), messages)
        h = torch.tanh(self.own(x) + gathered)
        degree = torch.zeros(len(x), dtype=x.dtype).index_add(0, target, torch.ones(len(target), dtype=x.dtype))
        mean = torch.zeros_like(h).index_add(0, target, h[source]) / degree.clamp(min=1).unsqueeze(1)
        return self.second(h + mean)


def images():
    return randn(3, 2, 8, 8)


def tokens():
    return randint(6, 3, 5)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), "points"),
    "resnet": (resnet, "images"),
    "resnet in train mode": (lambda: resnet().train(), "images"),
    "convnext": (ConvNeXt, "images"),
    "vit": (ViT, "images"),
    "gpt2": (GPT, "tokens"),
    "bert": (BERT, "tokens"),
    "llama": (Llama, "tokens"),
    "mixture of experts": (MixtureOfExperts, "points"),
    "lstm": (lambda: Recurrent(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)), "sequences"),
    "gru": (lambda: Recurrent(nn.GRU(4, 3, 2, batch_first=True)), "sequences"),
    "u-net": (UNet, "images"),
    "graph convolution": (GraphConvolution, "points"),
}
INPUTS = {
    "points": lambda: randn(6, 4),
    "images": images,
    "tokens": tokens,
    "sequences": lambda: randn(3, 5, 4),
}


def by_double_backprop(loss, params, v):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
        slope = sum((g * t).sum() for g, t in zip(gradient, v.values(), strict=True))
        product = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, product, strict=True))


def assert_products(loss, params, reference_loss, batch=(), product=hf.hvp, tolerance=1e-9):
    v = randn_like(params, seeded(7))
    reference = by_double_backprop(reference_loss, params, v)
    assert float(tree.norm(reference)) > 1e-6
    assert relative_error(product(loss, params, v, *batch), reference) < tolerance
    H = hf.hessian(loss, params, batch, product=product)
    assert relative_error(H(v), reference) < tolerance  # traced on the way
    assert relative_error(H(v), reference) < tolerance  # replayed
    two = H.matmat(tree.map_leaves(lambda x: torch.stack([x, -2 * x]), v))
    assert relative_error(tree.index(two, 1), tree.map_leaves(lambda x: -2 * x, reference)) < tolerance


def made(build, x):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build().double()
        model(x)  # gives lazy modules their shape
    return model


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_double_backprop(name):
    build, kind = MODELS[name]
    x = INPUTS[kind]()
    model = made(build, x) if "train" in name else made(build, x).eval()
    output = model(x)
    target = randint(output.shape[1], output.shape[0], *output.shape[2:], seed=5)
    loss, params = hf.module_loss(model, F.cross_entropy)
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def plain(p):
        state = {**p, **{name: b.clone() for name, b in buffers.items()}}
        return F.cross_entropy(functional_call(model, state, (x,)), target)

    assert_products(loss, params, plain, (x, target))


@pytest.mark.parametrize("tape", [False, True], ids=["torch.func inside", "tape inside"])
def test_physics_informed_network(tape):
    """``-u'' = sin`` with the network's second derivative in the loss, so that the Hessian takes four derivatives."""
    model = made(
        lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)), randn(2, 1)
    )
    call, params = hf.functionalize(model)
    x = torch.linspace(-1, 1, 7, dtype=F64)

    def by_func(p):
        u = torch.func.grad(torch.func.grad(lambda z: call(p, z.reshape(1))[0]))
        return (torch.func.vmap(u)(x) + x.sin()).square().mean()

    def by_tape(p):
        z = x.clone().unsqueeze(1).requires_grad_()
        first = torch.autograd.grad(call(p, z).sum(), z, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), z, create_graph=True)[0]
        return (second[:, 0] + x.sin()).square().mean()

    if tape:
        v = randn_like(params, seeded(7))
        with pytest.raises(NotImplementedError, match=r"torch's own tape.*Use hessfunc\.hvp_double_backward"):
            hf.hvp(by_tape, params, v)
        assert relative_error(hf.hvp_double_backward(by_tape, params, v), by_double_backprop(by_tape, params, v)) < 1e-9
    else:
        assert_products(by_func, params, by_tape)


def optional(name):
    """A module, if it is installed and fits this torch."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a build for another torch raises more than ImportError
        pytest.skip(f"{name} cannot be imported: {error}")


# Shapes are tiny, everything else is as the models come: attention by F.scaled_dot_product_attention, masks, caches.
TRANSFORMERS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 6}),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6},
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
        | {"num_key_value_heads": 1, "max_position_embeddings": 6},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
        | {"image_size": 8, "patch_size": 4, "num_channels": 2, "num_labels": 3},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
        | {"num_key_value_heads": 1, "max_position_embeddings": 6, "num_local_experts": 3}
        # F.grouped_mm, the default, takes no float64 and has no forward mode (tests/test_traps.py)
        | {"experts_implementation": "batched_mm"},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 1, "num_heads": 2},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 6, "decoder_ffn_dim": 6}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 10}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
}
# Their normalizations, rotary angles, routing or scans are computed in float32, whatever the parameters.
PARTLY_SINGLE = {"llama", "mixtral", "mamba", "t5"}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    transformers = optional("transformers")
    model, config, options = TRANSFORMERS[name]
    words = {} if name == "vit" else {"vocab_size": 7}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = getattr(transformers, model)(getattr(transformers, config)(**options, **words)).double().eval()
    call, params = hf.functionalize(built)
    given = {"pixel_values": images()} if name == "vit" else {"input_ids": randint(7, 2, 5)}
    given = {"input_features": randn(2, 8, 20)} if name == "whisper" else given
    given |= {"decoder_input_ids": randint(7, 2, 5, seed=2)} if name in ("t5", "whisper") else {}
    target = randint(3, 3) if name == "vit" else randint(7, 10, seed=1)

    def loss(p):  # the models' own losses cast to float32
        logits = call(p, **given).logits
        return F.cross_entropy(logits.reshape(len(target), -1), target)

    assert_products(loss, params, loss, tolerance=1e-5 if name in PARTLY_SINGLE else 1e-9)


def assert_products_of_images(build, monkeypatch):
    x = randn(2, 3, 32, 32)
    model = made(lambda: build().eval(), x).eval()
    output = model(x)
    target = randint(3, 2, *output.shape[2:], seed=5)
    loss, params = hf.module_loss(model, F.cross_entropy)

    def plain(p):
        with monkeypatch.context() as patch:  # torch does not differentiate it twice
            patch.setattr(F, "hardsigmoid", lambda z, *_inplace, **_options: F.relu6(z + 3) / 6)
            return F.cross_entropy(functional_call(model, p, (x,)), target)

    assert_products(loss, params, plain, (x, target))


def inverted_residuals(M):
    """MobileNet 3's blocks, with squeezing and without, by ``hardswish`` and ReLU; the gates are ``F.hardsigmoid``."""
    Block = M.mobilenetv3.InvertedResidualConfig
    blocks = [Block(8, 3, 8, 8, True, "RE", 2, 1, 1.0), Block(8, 5, 16, 8, True, "HS", 1, 1, 1.0)]
    return M.MobileNetV3(blocks, 16, num_classes=3)


def efficientnet(M):
    Block = M.efficientnet.MBConvConfig
    blocks = [Block(1, 3, 1, 8, 8, 1), Block(4, 5, 2, 8, 16, 2), Block(4, 3, 2, 16, 16, 1)]
    return M.EfficientNet(blocks, 0.0, num_classes=3, last_channel=16)


def convnext(M):
    Block = M.convnext.CNBlockConfig
    return M.ConvNeXt([Block(8, 16, 1), Block(16, None, 2)], num_classes=3)


def segmentation(head):
    """A segmentation network on a plain stack of convolutions."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    return nn.Sequential(body, head, nn.Upsample(scale_factor=4, mode="bilinear"))


def swin(M, **kwargs):
    return M.SwinTransformer([4, 4], 8, [1, 2], [2, 2], [2, 2], num_classes=3, **kwargs)


# As the packages build them, but for depth and width.
TORCHVISION = {
    "resnet": lambda M: M.ResNet(M.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3),
    "densenet": lambda M: M.DenseNet(4, (2, 2), 8, num_classes=3),
    "mobilenet 2": lambda M: M.mobilenet_v2(width_mult=0.1, num_classes=3),
    "mobilenet 3": inverted_residuals,
    "efficientnet": efficientnet,
    "shufflenet 2": lambda M: M.ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 32], num_classes=3),
    "regnet": lambda M: M.RegNet(M.regnet.BlockParams([1, 1], [8, 16], [4, 4], [1, 1], [2, 2], 0.25), num_classes=3),
    "convnext": convnext,
    "vit": lambda M: M.VisionTransformer(32, 8, 1, 2, 8, 16, num_classes=3),
    "swin": swin,
    "swin 2": lambda M: swin(
        M,
        block=M.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=M.swin_transformer.PatchMergingV2,
    ),
    "maxvit": lambda M: M.MaxVit((32, 32), 8, 2, [8, 8], [1, 1], 4, 0.0, num_classes=3),
    "fcn": lambda M: segmentation(M.segmentation.fcn.FCNHead(8, 3)),
    "deeplab 3": lambda M: segmentation(M.segmentation.deeplabv3.DeepLabHead(8, 3, [2, 4])),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, monkeypatch):
    models = optional("torchvision.models")
    assert_products_of_images(lambda: TORCHVISION[name](models), monkeypatch)


STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
TRANSFORMER = {"img_size": 32, "depth": 1, "embed_dim": 8, "num_heads": 2}
TIMM = {
    "resnet": lambda timm: timm.create_model("resnet10t", num_classes=3, channels=(8, 8, 8, 8)),
    "resnet with squeezing": lambda timm: timm.create_model("seresnet18", num_classes=3, channels=(8, 8, 8, 8)),
    "convnext": lambda timm: timm.create_model("convnext_atto", num_classes=3, **STAGES),
    "convnext 2": lambda timm: timm.create_model("convnextv2_atto", num_classes=3, **STAGES),
    "vit": lambda timm: timm.create_model("vit_tiny_patch16_224", num_classes=3, **TRANSFORMER),
    "vit with rotary positions": lambda timm: timm.create_model(
        "vit_small_patch16_rope_224", num_classes=3, **TRANSFORMER
    ),
    "beit": lambda timm: timm.create_model("beit_base_patch16_224", num_classes=3, **TRANSFORMER),
    "cait": lambda timm: timm.create_model("cait_xxs24_224", num_classes=3, **TRANSFORMER),
    "xcit": lambda timm: timm.create_model("xcit_nano_12_p16_224", num_classes=3, **TRANSFORMER),
    "mixer": lambda timm: timm.models.mlp_mixer.MlpMixer(3, 32, patch_size=8, num_blocks=1, embed_dim=8),
    "resmlp": lambda timm: timm.models.mlp_mixer.MlpMixer(
        3, 32, patch_size=8, num_blocks=1, embed_dim=8, mlp_ratio=4, block_layer=timm.models.mlp_mixer.ResBlock
    ),
    "ghostnet": lambda timm: timm.models.ghostnet.GhostNet(
        [[[3, 16, 16, 0, 1]], [[5, 24, 16, 0.25, 2]]], num_classes=3
    ),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name, monkeypatch):
    timm = optional("timm")
    assert_products_of_images(lambda: TIMM[name](timm), monkeypatch)
