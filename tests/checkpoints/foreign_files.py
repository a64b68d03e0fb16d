"""Foreign files for tests and notebooks: networks pickled as EDM's code does it, and files that attack their reader.

Nothing here is needed to read files. The stand-ins bear the names of EDM's classes only while a pickle is written.
"""
import io
import os
import pickle
import pickletools
import resource
import struct
import sys
import time
import traceback
import types
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

BUFFERS = ("resample_filter", "freqs", "phases", "u")


# ---- writing what EDM writes

class EasyDict(dict):
    "Stands for dnnlib.util.EasyDict."


def _reconstruct_persistent_obj(meta):
    raise AssertionError("only ever pickled by name")


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@contextmanager
def foreign_names():
    "For the time of writing, the stand-ins can be imported under the names of EDM's code."
    fakes = {
        name: types.ModuleType(name) for name in ("dnnlib", "dnnlib.util", "torch_utils", "torch_utils.persistence")
    }
    fakes["dnnlib.util"].EasyDict = EasyDict
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    before = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    try: yield
    finally:
        for name, module in before.items():
            if module is None: del sys.modules[name]
            else: sys.modules[name] = module


class Persistent(nn.Module):
    "A module that is pickled with its class's name and source text, as EDM's persistent classes are."
    source = "raise SystemExit('module_src was executed')"
    version = 6

    def __init__(self, class_name, args=(), **kwargs):
        super().__init__()
        self.class_name, self.args, self.kwargs = class_name, args, kwargs

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k not in ("class_name", "args", "kwargs")}
        state.update(_init_args=self.args, _init_kwargs=EasyDict(self.kwargs))
        meta = dict(type="class", version=self.version, module_src=self.source, class_name=self.class_name, state=state)
        return _reconstruct_persistent_obj, (EasyDict(meta),)


def _class_of(name, tensors, children):
    "The class that EDM uses for a module with these tensors and children."
    if name in ("enc", "dec"): return None  # an nn.ModuleDict
    if "norm0" in children: return "UNetBlock"
    if "freqs" in tensors: return "FourierEmbedding"
    weight = tensors.get("weight")
    if weight is None: return "Conv2d" if "resample_filter" in tensors else "Module"
    return {4: "Conv2d", 2: "Linear"}.get(weight.ndim, "GroupNorm")


def _tree(name, state, num_heads):
    "The modules below one name, from the dots of a state dict's names."
    own = {k: v for k, v in state.items() if "." not in k}
    parts = {}
    for k, v in state.items():
        if "." in k: parts.setdefault(k.partition(".")[0], {})[k.partition(".")[2]] = v
    class_name = _class_of(name, own, parts)
    module = nn.ModuleDict() if class_name is None else Persistent(class_name)
    for k, v in own.items():
        if k in BUFFERS: module.register_buffer(k, v)
        elif v.is_floating_point(): module.register_parameter(k, nn.Parameter(v, requires_grad=False))
        else: module.register_buffer(k, v)
    if class_name == "Conv2d" and "resample_filter" not in own: module.register_buffer("resample_filter", None)
    for k, v in parts.items(): module._modules[k] = _tree(k, v, num_heads)
    if class_name == "UNetBlock":
        module.num_heads = num_heads(parts["qkv"]["weight"].shape[0] // 3) if "qkv" in parts else 0
        doubled = "affine" in parts and len(parts["affine"]["weight"]) == 2 * len(
            parts["conv0"]["weight"]
        )  # as ADM has it: scale and shift
        module.skip_scale, module.dropout, module.adaptive_scale = 1. if doubled else np.sqrt(.5), .1, doubled
        module.kwargs = dict(
            emb_channels=8, init=dict(init_mode="xavier_uniform", init_weight=np.sqrt(0.2)), resample_filter=[1, 1]
        )
    return module


def make_edm_pickle(
    path,
    state,
    class_name="EDMPrecond",
    model_class="SongUNet",
    protocol=4,
    canary=None,
    num_heads=None,
    short=False,
    extra=None,
    **config,
):
    """Write a state dict as an EDM network pickle, and give back its path.

    `config` becomes arguments of the preconditioner and its plain attributes; `num_heads` attention heads (default: 1,
    or one for 64 channels in a DhariwalUNet), a number or a function of a block's channels; `canary` a file that the
    stored source text would create if it were run; `extra` further entries of the pickled dict; `short` leaves out what
    networks carry besides `ema`."""
    if num_heads is None:
        heads = lambda channels: max(channels // 64, 1) if model_class == "DhariwalUNet" else 1
    else: heads = num_heads if callable(num_heads) else lambda channels: num_heads
    net = Persistent(class_name, model_type=model_class, **config)
    net.use_fp16 = False
    for k, v in config.items(): setattr(net, k, v)
    body = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    for k, v in state.items():
        if not k.startswith("model."): net.register_buffer(k, v)
    model = _tree("model", body, heads)
    model.class_name, model.kwargs = model_class, dict(config)
    model.label_dropout = 0
    net._modules["model"] = model
    if "enc" in model._modules: net.register_buffer("scratch", torch.zeros(3), persistent=False)
    loss = Persistent("EDMLoss", P_mean=-1.2)
    data = dict(ema=net)
    if not short:
        data.update(
            loss_fn=loss,
            augment_pipe=Persistent("AugmentPipe", p=0.12),
            dataset_kwargs=EasyDict(path="cifar10.zip", use_labels=True, seen={1, 2}),
        )
    source = f"open({str(canary)!r}, 'w').close()\nraise SystemExit('module_src was executed')"
    Persistent.source = source if not short else source[:30]
    with foreign_names(), open(path, "wb") as f: pickle.dump({**data, **(extra or {})}, f, protocol=protocol)
    return Path(path)


def _edm2_tree(name, state, num_heads):
    "The modules below one name of an EDM2 network."
    own = {k: v for k, v in state.items() if "." not in k}
    parts = {}
    for k, v in state.items():
        if "." in k: parts.setdefault(k.partition(".")[0], {})[k.partition(".")[2]] = v
    layer = "MPFourier" if "freqs" in own else "MPConv" if "weight" in own else "UNet"
    module = nn.ModuleDict() if name in ("enc", "dec") else Persistent("Block" if "conv_res0" in parts else layer)
    for k, v in own.items():
        if k in BUFFERS: module.register_buffer(k, v)
        else: module.register_parameter(k, nn.Parameter(v, requires_grad=False))
    for k, v in parts.items(): module._modules[k] = _edm2_tree(k, v, num_heads)
    if "conv_res0" in parts:
        for k in ("conv_skip", "attn_qkv", "attn_proj"):
            if k not in parts: setattr(module, k, None)
        module.out_channels, module.num_heads = len(parts["conv_res1"]["weight"]), 0
        if "attn_proj" in parts: module.num_heads = num_heads(len(parts["attn_proj"]["weight"]))
        module.flavor, module.resample_mode, module.resample_filter, module.dropout = "enc", "keep", [1, 1], 0.
        module.res_balance, module.attn_balance, module.clip_act = .3, .3, 256
    if layer == "UNet" and "conv_res0" not in parts and name == "unet":
        module.label_balance, module.concat_balance = .5, .5
    if layer == "MPConv": module.out_channels = len(own["weight"])
    return module


def _edm2_encoder(name):
    "What an EDM2 snapshot holds besides the network."
    encoder = Persistent(name)
    if name == "StabilityVAEEncoder":
        encoder.vae_name, encoder.batch_size, encoder._vae = "stabilityai/sd-vae-ft-mse", 8, None
        encoder.scale, encoder.bias = np.float32([.12, .11, .13, .15]), np.float32([-.7, -.35, -.02, .33])
    return encoder


def make_edm2_snapshot(
    path,
    state,
    encoder="StandardRGBEncoder",
    version=6,
    canary=None,
    num_heads=lambda channels: channels // 16,
    **changed,
):
    """Write a state dict ("unet.out_gain", ...) as an EDM2 snapshot, and give back its path.

    `encoder` None leaves it out; `num_heads` is a function of a block's channels; `changed` are attributes that every
    module gets; `canary` as in `make_edm_pickle`."""
    net = Persistent("Precond", model_channels=32, dropout=0., use_fp16=True, img_resolution=16, img_channels=3)
    for k, v in dict(img_resolution=16, img_channels=3, use_fp16=True, sigma_data=.5).items(): setattr(net, k, v)
    for part in ("unet", "logvar_fourier", "logvar_linear"):
        below = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{part}.")}
        net._modules[part] = _edm2_tree(part, below, num_heads)
    for module in net.modules():
        for k, v in changed.items():
            if hasattr(module, k): setattr(module, k, v)
    data = EasyDict(encoder=_edm2_encoder(encoder)) if encoder else EasyDict()
    data.update(dataset_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset", use_labels=True),
                loss_fn=Persistent("EDM2Loss", P_mean=-.8, P_std=1.6, sigma_data=.5), ema=net.eval())
    Persistent.source, Persistent.version = f"open({str(canary)!r}, 'w').close()\nraise SystemExit('executed')", version
    try:
        with foreign_names(), open(path, "wb") as f: pickle.dump(data, f, protocol=4)
    finally: Persistent.version = 6
    return Path(path)


def legacy_bytes(tensor):
    "A tensor's storage as torch pickles it: a file of the older format in a byte string."
    return next(arg for _, arg, _ in pickletools.genops(pickle.dumps(tensor, 4)) if isinstance(arg, bytes))


# ---- attacks

class Call:
    "Pickled as the call of any function with any arguments."
    def __init__(self, function, *args, state=None): self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def text(s): return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def glob(module, name): return f"c{module}\n{name}\n".encode()


def ema(program): return b"\x80\x04}(" + text("ema") + program + b"u."


def thing(class_name, state):
    return (
        glob("torch_utils.persistence", "_reconstruct_persistent_obj")
        + b"}("
        + b"".join(
            text(k) + v
            for k, v in dict(
                type=text("class"), version=b"K\x06", module_src=text(""), class_name=text(class_name), state=state
            ).items()
        )
        + b"u\x85R"
    )


def blob(data): return b"B" + struct.pack("<I", len(data)) + data


def load_bytes(data): return glob("torch.storage", "_load_from_bytes") + blob(data) + b"\x85R"


def tensor(storage, offset, size, stride):
    return (
        glob("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage
        + b"".join(pickle.dumps(x, 2)[2:-1] for x in (offset, size, stride, False))
        + b"}tR"
    )


def legacy(program, keys=("0",), raw=b""):
    "A file of torch's older format around a program."
    head = [
        pickle.dumps(x, 2)
        for x in (0x1950A86A20F9469CFC6C, 1001, dict(protocol_version=1001, little_endian=True, type_sizes={}))
    ]
    return b"".join(head) + b"\x80\x02" + program + b"." + pickle.dumps(list(keys), 2) + raw


def storage_id(numel, kind="FloatStorage", old=True):
    "The older format has one entry more, for what the storage is a part of."
    return (
        b"("
        + text("storage")
        + glob("torch", kind)
        + text("0")
        + text("cpu")
        + pickle.dumps(numel, 2)[2:-1]
        + (b"NtQ" if old else b"tQ")
    )


def zip_bytes(files, compression=zipfile.ZIP_STORED, extra=b""):
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w", compression) as z:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.extra, info.compress_type = extra, compression
            z.writestr(info, data)
    return f.getvalue()


# Archives that torch's reader and Python's may understand differently; ours is Python's, which finds the honest one.
ONE_READER = set("""capitals.pt capitals_after.pt beside.pt absolute.pt upwards.pt backslash.pt letters.pt tables.pt
comment.pt fewer.pt renamed.pt moved.pt""".split())


def shown(result):
    "Names and shapes of what a reader gave."
    state = result[0] if type(result) is tuple else getattr(result, "state", result)
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in state.items())


@dataclass
class Attack:
    name: str  # of the file
    tries: str  # in words
    read: str  # name of the reader for what it pretends to be
    path: Path
    harmless: str | None = None  # what may be read of it, as `shown` says; None: it must be refused

    @property
    def size(self): return self.path.lstat().st_size


def executing(canary):
    "Pickles that run code in Python's own unpickler: name, what, bytes of the file."
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    evil = pickle.dumps(Call(os.system, command), 2)
    dump = lambda x, protocol=4: pickle.dumps({"ema": x}, protocol)
    yield "os_system.pkl", "`os.system` by REDUCE", dump(Call(os.system, command))
    yield "os_system_0.pkl", "the same in protocol 0", dump(Call(os.system, command), 0)
    yield "eval.pkl", "`eval` by REDUCE", dump(Call(eval, code))
    yield "exec.pkl", "`exec` beside an honest looking dict", pickle.dumps({"ema": {}, "loss_fn": Call(exec, code)}, 3)
    yield "getattr.pkl", "`getattr` of an imported module", dump(Call(getattr, Call(__import__, "os"), "system"))
    yield (
        "dotted.pkl",
        "a name with dots: `collections`, `_sys.modules`",
        ema(text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93"),
    )
    yield "torch_load.pkl", "`torch.load` of a byte string", dump(Call(torch.load, io.BytesIO))
    yield "nested.pkl", "a pickle with `os.system` as the bytes of a storage", ema(load_bytes(evil))
    yield (
        "nested_torch.pkl",
        "`os.system` where a nested torch file has its object",
        ema(load_bytes(legacy(evil[2:-1]))),
    )
    yield (
        "nested_zip.pkl",
        "a nested torch file in the newer format",
        ema(load_bytes(zip_bytes({"a/data.pkl": evil, "a/version": b"3"}))),
    )
    yield (
        "copyreg.pkl",
        "`copyreg._reconstructor` of a foreign class",
        ema(glob("copyreg", "_reconstructor") + b"(" + glob("os", "_wrap_close") + glob("builtins", "object") + b"NtR"),
    )
    yield "extension.pkl", "a registered extension (EXT1)", ema(b"\x82\x01")
    yield "inst.pkl", "`os.system` by INST", ema(b"(" + text(command) + b"ios\nsystem\n")
    yield "persistent_id.pkl", "an object from outside of the file", ema(text("anything") + b"\x85Q")
    yield (
        "class.pkl",
        "BUILD that sets `__class__`",
        ema(thing("EDMPrecond", b"}" + text("__class__") + glob("torch.nn.modules.linear", "Linear") + b"s")),
    )
    yield (
        "dict.pkl",
        "BUILD that sets `__dict__` of a torch class",
        ema(glob("torch.nn.modules.linear", "Linear") + b")\x81}" + text("__dict__") + b"}sb"),
    )
    yield (
        "setstate.pkl",
        "BUILD of a function",
        ema(glob("torch._utils", "_rebuild_tensor_v2") + b"}" + text("__code__") + b"Nsb"),
    )
    yield (
        "slots.pkl",
        "BUILD with a second dict, for slots",
        ema(glob("torch.nn.modules.linear", "Linear") + b")\x81N}" + text("x") + b"Ns\x86b"),
    )


def bombs():
    "Pickles that ask for memory or time: name, what, bytes of the file."
    four = legacy(storage_id(4), raw=struct.pack("<q4f", 4, 1, 2, 3, 4))
    yield "size.pkl", "a tensor of 2**40 numbers over 4", ema(tensor(load_bytes(four), 0, (2**40,), (1,)))
    yield "expand.pkl", "the same by a stride of 0", ema(tensor(load_bytes(four), 0, (2**30,), (0,)))
    yield "offset.pkl", "a tensor beside its storage", ema(tensor(load_bytes(four), 2**20, (2,), (1,)))
    yield "negative.pkl", "a tensor before its storage", ema(tensor(load_bytes(four), 0, (2,), (-1000,)))
    yield (
        "storage.pkl",
        "a storage that claims 2**40 numbers",
        ema(load_bytes(legacy(storage_id(2**40), raw=struct.pack("<q4f", 2**40, 1, 2, 3, 4)))),
    )
    yield (
        "count.pkl",
        "a storage whose count differs",
        ema(load_bytes(legacy(storage_id(4), raw=struct.pack("<q4f", 2**40, 1, 2, 3, 4)))),
    )
    yield "binbytes8.pkl", "a byte string of 2**62 bytes", ema(b"\x8e" + struct.pack("<Q", 2**62))
    yield "unicode8.pkl", "a string of 2**62 bytes", ema(b"\x8d" + struct.pack("<Q", 2**62))
    yield "long.pkl", "a number of a million digits", ema(b"\x8b" + struct.pack("<i", 400_000) + b"\x7f" * 400_000)
    yield "memo.pkl", "a memo of four billion entries", ema(b"Nr" + struct.pack("<I", 2**32 - 1))
    yield "lists.pkl", "two million lists", ema(b"(" + b"]" * 2_000_000 + b"t")
    net = text("_modules") + b"}" + text("model") + thing("SongUNet", b"}") + b"s"
    laughs = b"(" + b"]q\x00" + b"](h\x00h\x00eq\x00" * 200 + b"t"
    yield (
        "laughs.pkl",
        "attributes: lists of lists, each doubling the next (2**200)",
        ema(
            thing(
                "EDMPrecond",
                b"}(" + text("list") + laughs + text("_init_kwargs") + b"}" + text("x") + b"h\x00s" + net + b"u",
            )
        ),
    )
    yield "deep.pkl", "a tuple 100,000 deep as the key of a dict", ema(b"}" + b")" + b"\x85" * 100_000 + b"Ns")
    yield (
        "again.pkl",
        "one storage of 1 MB loaded 100,000 times",
        ema(
            glob("torch.storage", "_load_from_bytes")
            + b"q\x00"
            + blob(legacy(storage_id(1 << 20, "ByteStorage"), raw=struct.pack("<q", 1 << 20) + bytes(1 << 20)))
            + b"\x85q\x01"
            + b"R"
            + b"h\x00h\x01R" * 100_000
        ),
    )
    yield (
        "astral.pkl",
        "strings that grow fourfold in memory",
        ema(b"(" + text("a" * 1_000_000 + "\U0001f600") * 8 + b"t"),
    )
    double = b"}" + text("_modules") + b"}(" + text("a") + b"h\x00" + text("b") + b"h\x00us"
    chain = b"(" + thing("M", b"}") + b"q\x00" + b"".join(thing("M", double) + b"q\x00" for _ in range(25)) + b"t"
    yield "modules.pkl", "a network whose every module has its child twice", ema(
        thing("EDMPrecond", b"}(" + text("chain") + chain + text("_modules") + b"}" + text("model") + b"h\x00su"))
    names = b"(" + text("n" * 50_000) + b"q\x01" + b")\x85" * 2 + b"t"
    many = b"}" + text("_parameters") + b"}h\x01h\x02ss"
    longest = b"(" + names + tensor(load_bytes(four), 0, (1,), (1,)) + b"q\x02" + thing("M", many) + b"q\x00t"
    children = b"".join(text(str(i)) + b"h\x00" for i in range(5000))
    yield (
        "names.pkl",
        "a name of 50 kB for each of 5,000 tensors",
        ema(
            thing(
                "EDMPrecond",
                b"}("
                + text("x")
                + longest
                + text("_modules")
                + b"}"
                + text("model")
                + thing("M", b"}" + text("_modules") + b"}(" + children + b"us")
                + b"su",
            )
        ),
    )
    yield (
        "cycle.pkl",
        "a module that contains itself",
        ema(
            glob("torch.nn.modules.container", "ModuleDict")
            + b")\x81q\x00}"
            + text("_modules")
            + b"}"
            + text("model")
            + b"h\x00ssb"
        ),
    )


def torch_bombs(canary):
    "Files for the reader of torch files: name, what, bytes of the file."
    evil = pickle.dumps({"w": Call(os.system, f"touch {canary}")}, 2)
    program = b"\x80\x02}" + text("w") + tensor(storage_id(2**40), 0, (4,), (1,)) + b"s."
    yield "evil.pt", "`os.system` in a zip archive of torch", zip_bytes({"a/data.pkl": evil, "a/version": b"3"})
    yield "evil_old.pt", "`os.system` in torch's older format", legacy(evil[2:-1], ())
    yield (
        "bomb.pt",
        "compressed entries: 64 MB in 65 kB",
        zip_bytes({"a/data.pkl": evil, "a/data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED),
    )
    yield (
        "storage.pt",
        "a storage that claims 2**40 numbers",
        zip_bytes({"a/data.pkl": program, "a/data/0": bytes(16), "a/version": b"3"}),
    )
    yield "storage_old.pt", "the same in torch's older format", legacy(program[2:-1], raw=struct.pack("<q", 2**40))
    twice = zip_bytes({"a/data.pkl": evil, "a/data/0": bytes(999), "a/data/1": bytes(9)})
    yield (
        "overlap.pt",
        "an entry as long as a terabyte",
        twice[:-22].replace(struct.pack("<2I", 9, 9), struct.pack("<2I", 2**31, 2**31)) + twice[-22:],
    )
    yield "table.pt", "a table of contents of 4 GB", twice[:-10] + struct.pack("<2I", 2**32 - 2, 0) + twice[-2:]
    cut = zip_bytes({"a/data.pkl": evil})
    yield "cut.pt", "half an archive", cut[:len(cut) // 2]


def pickled_state(size, stride, numel):
    "The program of a state dict with one tensor, `w`."
    return b"\x80\x02}" + text("w") + tensor(storage_id(numel, old=False), 0, size, stride) + b"s."


def two_tables(first, second):
    """An archive with two tables of contents: readers that count from the beginning find the first, others the second.

    Both have the same names, so that their tables are of one length."""
    long = {k: max(len(first[k]), len(second[k])) for k in first}
    first, second = (zip_bytes({k: v.ljust(long[k], b".") for k, v in files.items()}) for files in (first, second))
    return first[:-22] + second[:-22] + first[-22:]


def two_ways():
    "Archives that hold an honest network for one reader and something else for another: name, what, bytes of the file."
    honest, endless, numbers = (
        pickled_state((3,), (1,), 3),
        pickled_state((2**40,), (0,), 3),
        {"data/0": bytes(12), "version": b"3\n"},
    )

    def files(root, program, name="data.pkl"):
        return {f"{root}/{k}": v for k, v in {name: program, **numbers}.items()}

    plain = zip_bytes(files("a", honest))
    yield (
        "capitals_below.pt",
        "2**40 numbers in `a/DATA.PKL`, first; an honest `a/b/data.pkl`",
        zip_bytes(files("a", endless, "DATA.PKL") | files("a/b", honest)),
    )
    yield (
        "capitals_list.pt",
        "the same with a list",
        zip_bytes(files("a", pickle.dumps([1, 2, 3], 2), "DATA.PKL") | files("a/b", honest)),
    )
    yield (
        "capitals.pt",
        "`a/DATA.PKL` first and an honest `a/data.pkl`",
        zip_bytes({"a/DATA.PKL": endless, **files("a", honest)}),
    )
    yield (
        "capitals_after.pt",
        "the same, the honest one first",
        zip_bytes({"a/data.pkl": honest, "a/DATA.PKL": endless, **files("a", honest)}),
    )
    yield "folders.pt", "two folders, each with a network", zip_bytes(files("a", endless) | files("b", honest))
    yield (
        "below.pt",
        "`a/version` first, the network in `a/b`",
        zip_bytes({"a/version": b"3\n", **files("a/b", honest)}),
    )
    yield (
        "deeper.pt",
        "an honest `a/b/data.pkl` first, 2**40 numbers in `a/data.pkl`",
        zip_bytes(files("a/b", honest) | files("a", endless)),
    )
    yield "beside.pt", "an entry beside the folder", zip_bytes({**files("a", honest), "version": b"3\n"})
    yield "absolute.pt", "absolute names", zip_bytes(files("", honest))
    yield "upwards.pt", "a name with `..`", zip_bytes({**files("a", honest), "a/../b/data.pkl": endless})
    yield "backslash.pt", "a name with a backslash", zip_bytes({**files("a", honest), "a/b\\data.pkl": endless})
    yield (
        "zero.pt",
        "a name with a zero byte",
        zip_bytes({**files("a", honest), "a/data.pkl?": endless}).replace(b"data.pkl?", b"data.pkl\0"),
    )
    yield "letters.pt", "a name beyond ASCII", zip_bytes({**files("a", honest), "a/d\u00e4ta.pkl": endless})
    yield "tables.pt", "two tables of contents", two_tables(files("a", endless), files("a", honest))
    yield "comment.pt", "a comment behind the table of contents", plain[:-2] + b"\4\0more"
    yield "fewer.pt", "a table of contents longer than it says", plain[:-12] + b"\2\0" + plain[-10:]
    yield "inner.pt", "an entry with another name in its own header", plain.replace(b"a/data/0", b"a/data/1", 1)
    yield (
        "longer.pt",
        "the same, a longer one",
        plain.replace(struct.pack("<2H", 10, 0) + b"a/data.pkl", struct.pack("<2H", 11, 0) + b"a/data.pkl", 1),
    )
    yield (
        "mark.pt",
        "an entry whose own header is none",
        plain.replace(b"PK\3\4", b"PK\3\5").replace(b"PK\3\5", b"PK\3\4", 1),
    )
    yield (
        "renamed.pt",
        "an entry with a second name in an extra field",
        zip_bytes(files("a", honest), extra=struct.pack("<2HBI", 0x7075, 6, 1, 0) + b"b"),
    )
    yield "moved.pt", "an entry with two places in extra fields", zip_bytes(files("a", honest), extra=b"\1\0\0\0" * 2)
    yield "split.pt", "an archive of several volumes", b"PK00" + plain


def failures():
    "Files that went wrong: name, what, bytes of the file."
    pickled = pickle.dumps({"G_ema": 1, "D": [2]}, 4)
    yield "text.pkl", "a text file", b"These are not the weights you are looking for.\n" * 9
    yield "empty.pkl", "an empty file", b""
    yield (
        "page.pkl",
        "a page instead of a file",
        b"\n<!DOCTYPE html>\n<html><body>Too many downloads today</body></html>",
    )
    yield "pointer.pkl", "a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    yield "photo.pkl", "a JPEG picture", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(range(256))
    yield "zeros.pkl", "a file of zeros", bytes(5000)
    yield "noise.pkl", "noise", bytes((i * i * 31 + 7 * i) % 251 for i in range(3, 4000))
    yield "other.pkl", "a pickle of something else", pickled
    yield "number.pkl", "a pickle of a number", pickle.dumps(3, 4)
    yield "cut.pkl", "a pickle that breaks off", pickled[:-9]
    yield "escape.pkl", "a class name that clears the terminal", ema(thing("\x1b[2J\nok", b"}"))


def other_formats(canary):
    arrays = io.BytesIO()
    np.savez(arrays, arr_0=np.zeros(3))
    optimizer = io.BytesIO()
    torch.save({"epoch": 3, "optimizer": {"lr": .1}, "net": [torch.ones(2)]}, optimizer)
    yield "arrays.pt", "arrays of numpy (.npz)", arrays.getvalue()
    yield "pictures.pt", "a zip archive of pictures", zip_bytes({"00000/img00000000.png": b"\x89PNG"})
    yield "training.pt", "a torch file without a state dict", optimizer.getvalue()


def safetensors_failures():
    header = b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    yield "cut.safetensors", "a header longer than the file", struct.pack("<Q", 900) + b'{"w":'
    yield "huge.safetensors", "a tensor of 2**40 numbers", struct.pack("<Q", len(header)) + header + bytes(16)
    yield "header.safetensors", "a header of 2**63 bytes", struct.pack("<Q", 2**63) + b"{}" + bytes(99)


def in_child(function, memory=None):
    """(what a function returned or the error it raised, seconds, MB that it took at the peak), from a forked process.

    `memory` limits the address space to so many MB more than now."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receive)
            unlimited = resource.getrlimit(resource.RLIMIT_AS)
            if memory and sys.platform == "linux":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + (memory << 20), unlimited[1]))
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            try: result = function()
            except BaseException as e: result = e
            seconds = time.perf_counter() - start
            taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            resource.setrlimit(resource.RLIMIT_AS, unlimited)  # an answer needs memory, too
            with open(send, "wb") as f: pickle.dump((result, seconds, taken), f)
        except BaseException: traceback.print_exc()
        finally: os._exit(0)
    os.close(send)
    with open(receive, "rb") as f: answer = f.read()
    status = os.waitpid(child, 0)[1]
    if not answer: raise RuntimeError(f"the child died, status {status}")
    return pickle.loads(answer)


def make_attacks(folder, canary):
    "Write all of them into a folder; `canary` is the file that a payload would create."
    folder, attacks = Path(folder), []
    groups = (
        (executing(canary), "read_edm_pickle"),
        (bombs(), "read_edm_pickle"),
        (torch_bombs(canary), "read_weights"),
        (two_ways(), "read_weights"),
        (failures(), "read_edm_pickle"),
        (other_formats(canary), "read_weights"),
        (safetensors_failures(), "read_safetensors"),
    )
    for files, read in groups:
        for name, tries, data in files:
            (folder/name).write_bytes(data)
            attacks.append(Attack(name, tries, read, folder/name))
    make_edm_pickle(folder/"source.pkl", {"model.a.weight": torch.ones(2, 2)}, canary=canary)
    next(a for a in attacks if a.name == "laughs.pkl").harmless = ""  # what nobody looks at is never unfolded
    for attack in attacks:
        if attack.name in ONE_READER: attack.harmless = "w (3,)"
    attacks.append(
        Attack(
            "source.pkl",
            "source text that would run (`module_src`)",
            "read_edm_pickle",
            folder / "source.pkl",
            harmless="model.a.weight (2, 2)",
        )
    )
    (folder/"a_folder.pkl").mkdir()
    (folder/"loop.pkl").symlink_to(folder/"loop.pkl")
    os.mkfifo(folder/"pipe.pkl")
    for name, tries in (("a_folder.pkl", "a folder"), ("loop.pkl", "a link to itself"), ("pipe.pkl", "a named pipe"), ):
        attacks.append(Attack(name, tries, "read_edm_pickle", folder/name))
    attacks.append(Attack("/dev/zero", "an endless device", "read_weights", Path("/dev/zero")))
    return attacks
