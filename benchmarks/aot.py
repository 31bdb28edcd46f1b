"""Compile every Triton kernel for a Hopper GPU, on any machine, and analyse the machine code.

    python -m benchmarks.aot             # every form, in some 150 seconds of one core
    python -m benchmarks.aot --last      # the last form of each kernel and dtype, a third of that

A row describes one kernel in one form in which it is launched:

    registers          per thread
    stack              bytes per thread; more than 0 means that registers spill
    shared             bytes of shared memory per block; an H200 has 232448
    HGMMA, HMMA        instructions that multiply matrices of 64 rows, and of 16 rows
    UTMALDG, UTMASTG   instructions that load and store tiles
    LDGSTS             instructions that load asynchronously to shared memory
    LDL, STL           instructions that spill

The last line is JSON.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from expo_fast.inference.sampling import BLOCK
from expo_fast.kernels import (
    blocks,
    decode,
    draw,
    groups,
    layer,
    policy_sums,
    row_results,
    rowwise,
    selection,
    training_layer,
    truncate,
)
from expo_fast.kernels import logprob as k
from expo_fast.kernels.advantage import rounding_noise
from expo_fast.kernels.head import IGNORE

# The constants that are printed, because forms of a kernel differ in them.
SHOWN = ("STORE", "BIAS", "LARGEST", "REDONE", "H", "DH", "HALF", "INVERSE", "WIDTH")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COUNTED = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL")
INTEGERS = ("N", "V", "D", "sx", "sw", "se", "sdz", "stride")
TYPES = dict.fromkeys(INTEGERS, "i32")
TYPES |= {"targets": "*i64", "any_again": "*i1", "tile_again": "*i1", "row_again": "*i1"}
# Integer arguments that need not be divisible by 16.
UNALIGNED = ("N", "V", "M", "window", "SLOTS", "H", "BLOCKS")

# A kernel; the types of its arguments that are not fp32 pointers; its constants; compiler options.
Form = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def launched() -> Iterator[Form]:
    """Yield every kernel in each form in which it is launched."""
    yield from fused_head(k.VARIANTS[k.BY_CARD["default"]])
    for bias in ({"BIAS": False, "bias": None}, {"BIAS": True}):
        pointers = {"x": "*bf16", "w": "*bf16"}
        yield k.target_logits, pointers, {"BLOCK": k.ELEMENTS} | bias, {}
    yield from rows_of_head(k.VARIANTS[k.BY_CARD["default"]])
    elements = {"BLOCK": k.ELEMENTS}
    yield k.scale_stored, {"e": "*bf16", "dz": "*bf16"}, elements, {}
    block, options = {"BLOCK": rowwise.BLOCK}, {"num_warps": rowwise.WARPS}
    yield rowwise.row_sums, {}, block | {"SAFE_SUM": rowwise.SAFE_SUM}, options
    for narrow, dz in ((False, "*fp32"), (True, "*bf16")):
        constants = block | {"NARROW": narrow}
        yield rowwise.row_gradients, {"dz": dz}, constants, options

    for targets in ("*i64", "*i32"):
        for wanted in ({"wanted": None}, {}):
            types = {"targets": targets, "wanted": "*i1", "rows": "*i64", "counts": "*i32"}
            constants = wanted | {"IGNORE": IGNORE, "BLOCK": selection.BLOCK}
            yield selection.select_rows, types, constants, {}

    types = {"side": "*i8", "on_policy": "*i1", "kl_coef": "fp32", "entropy_coef": "fp32"}
    options = {"num_warps": policy_sums.WARPS}
    yield policy_sums.sum_policy_terms, types, {"BLOCK": policy_sums.BLOCK}, options

    for scale in ({"GROUP": True, "BATCH": False}, {"GROUP": False, "BATCH": True}):
        sizes = {"rewards": "*fp64", "ids": "*i64", "M": "i32", "eps": "fp32"}
        constants = scale | {"NOISE": rounding_noise(torch.float32), "BLOCK": groups.BLOCK}
        yield groups.centre_and_scale, sizes, constants, {}
    for dtype in DTYPES:
        yield from decoding(dtype)
    for dtype in ("bf16", "fp16"):
        yield from training(dtype)
    yield from drawing()


def fused_head(config: k.Config) -> Iterator[Form]:
    """Yield the fused kernels of the LM head with a tile."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    tile = dict(vars(config))
    for name in (*options, "MASK_ALL", "MOMENT"):
        del tile[name]
    tile |= {"PROGRAMS": 132}
    stored = f"tensordesc<bf16[{config.BN}, {config.BV}]>"
    given = {"x": f"tensordesc<bf16[{config.BN}, {config.BD}]>"}
    given |= {"w": f"tensordesc<bf16[{config.BV}, {config.BD}]>", "e": stored, "dz": stored}
    forward: dict[str, Any] = {"MASK_ALL": config.MASK_ALL, "MOMENT": config.MOMENT}
    if not config.MOMENT:
        forward["moment"] = None
    all_tiles = {"any_again": None, "tile_again": None, "LARGEST": False}
    for bias in ({"BIAS": False, "bias": None}, {"BIAS": True}):
        for store in ({"STORE": False, "e": None}, {"STORE": True}):
            for mode in (all_tiles, {"LARGEST": True}, {"LARGEST": False}):
                yield k.softmax_sums, given, tile | forward | bias | store | mode, options
        yield k.logit_gradients, given, tile | bias, options


def rows_of_head(config: k.Config) -> Iterator[Form]:
    """Yield the kernels between the GEMMs of the fused head."""
    size = {"ROWS": row_results.ROWS, "AT_ONCE": row_results.AT_ONCE}
    size |= {"BN": config.BN, "BV": config.BV}
    types = dict.fromkeys(("logp", "entropy", "lse", "log_total"), "*fp64") | {"e": "*bf16"}
    fixed = {"SAFE_SUM": k.SAFE_SUM, "LOG2_E": k.LOG2_E}
    for store in ({"e": None, "se": 0}, {}):
        for moment in ({"moment": None}, {}):
            for redone in (False, True):
                constants = size | fixed | store | moment | {"REDONE": redone}
                yield row_results.row_results, types, constants, {}
    yield row_results.largest_logits, types, size, {}


# Layers, heads, key-value heads and head size of Qwen2.5 0.5B and 3B, of Phi-3, whose head size is
# not a power of two, and of Gemma 2, whose head size is the largest.
DECODERS = ((24, 14, 2, 64), (36, 16, 2, 128), (32, 32, 32, 96), (26, 8, 4, 256))


def decoding(dtype: str) -> Iterator[Form]:
    """Yield the kernels of a decode step for a model of a dtype."""
    types: dict[str, str] = dict.fromkeys(
        ("layer", "window", "W", "SLOTS", "width", "H", "half"), "i32"
    )
    types |= dict.fromkeys(("q_row", "k_row", "v_row", "gate_row", "up_row"), "i32")
    types |= dict.fromkeys(("scale", "eps"), "fp32")
    types |= dict.fromkeys(("tables", "items", "count", "used"), "*i32")
    types |= dict.fromkeys(("address", "positions"), "*i64")
    types |= dict.fromkeys(("q", "k", "v", "out", "q_norm", "k_norm", "cos", "sin"), f"*{dtype}")
    types |= dict.fromkeys(("x", "d", "w", "total", "gate", "up"), f"*{dtype}")
    for layers, heads, kv_heads, dim in DECODERS:
        cache = decode.Paged(torch.empty(1), layers, 32, kv_heads, dim).constants
        block = {"BD": triton.next_power_of_2(dim)}
        tile = decode.tile_for(DTYPES[dtype], dim)
        rows = {"FEW": tile.few, "MANY": decode.MANY, "BN": tile.tokens, "H": heads}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        fixed = {"FIELDS": decode.FIELDS}
        sums = {"total": "*fp32"}  # for every dtype of the model
        yield decode.attend_items, types | sums, cache | rows | block | fixed, options
        group = triton.next_power_of_2(heads // kv_heads)
        slots = {"H": heads, "HKV": kv_heads, "DH": dim, "BG": group} | block
        warps = {"num_warps": decode.slot_warps(group, block["BD"])}
        yield decode.add_slots, types | sums, slots, warps
        new = {"BLOCK": triton.next_power_of_2(kv_heads * dim)}
        yield decode.append_tokens, types, cache | new, {}
        for norm in (False, True):
            heads_form = {"BLOCK": block["BD"] // 2, "NORM": norm, "ROPE": True}
            yield layer.place_heads, types, cache | heads_form, {"num_warps": 1}
        rotation_form = {"BLOCK": block["BD"] // 2}
        yield layer.rotation_rows, types, rotation_form, {"num_warps": 1}
    for no_sum in ({"d": None, "total": None}, {}):
        constants = no_sum | {"BLOCK": 2048}
        yield layer.add_norm_rows, types, constants, {}
    elements = {"BLOCK": layer.ELEMENTS}
    yield layer.swiglu_elements, types, elements, {}


def training(dtype: str) -> Iterator[Form]:
    """Yield the kernels between the GEMMs of a training step for a model of a dtype."""
    names = "q k v cos sin q_out k_out v_out d_k d_v gate up d_out d_gate d_up"
    types: dict[str, str] = dict.fromkeys(names.split(), f"*{dtype}")
    types |= dict.fromkeys(("rows", "segments", "cu_seqlens", "first", "begins"), "*i32")
    types |= {"n": "i32"}
    elements = {"BLOCK": training_layer.ELEMENTS}
    yield training_layer.swiglu_gradient_elements, types, elements, {}
    for _, heads, kv_heads, dim in DECODERS:
        tile = training_layer.heads_tile(heads, kv_heads, dim)
        for inverse in (False, True):
            rotation_form = tile | {"INVERSE": inverse}
            yield training_layer.rotate_heads, types, rotation_form, training_layer.UNFUSED
        tile = training_layer.keys_tile(kv_heads, dim)
        yield training_layer.copy_key_rows, types, tile, {}
        sum_form = tile | {"TOGETHER": training_layer.TOGETHER}
        yield training_layer.sum_key_copies, types, sum_form, {}


def drawing() -> Iterator[Form]:
    """Yield the kernels of a draw. Logits are always fp32."""
    columns = {"BLOCK": BLOCK, "TOGETHER": blocks.TOGETHER}
    yield blocks.block_sums, {"BLOCKS": "i32"}, columns, {}
    rows = {"BLOCKS": "i32", "B": "i32", "BURST": "i32", "u": "*fp64", "us": "*fp64"}
    rows |= {"history": "*fp64"}
    rows |= dict.fromkeys(("seeds", "last_tokens", "positions", "index", "tokens"), "*i64")
    for record in (False, True):
        forms = {"MANY": 1024, "BLOCK": BLOCK, "RECORD": record}
        yield draw.draw_tokens, rows, forms, {}
    yield draw.record_tokens, rows, {"ROWS": draw.ROWS}, {}
    rules = {"BLOCKS": "i32", "top_k": "*i64", "token": "*i64", "u": "*fp64"}
    columns |= {"TOGETHER": truncate.TOGETHER, "LARGEST_GAP": truncate.LARGEST_GAP}
    yield truncate.draw_allowed, rules, columns, {"num_warps": truncate.WARPS}


def compile_for_hopper(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Compile a kernel in one form. Return what is printed of it."""
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    known_types = TYPES | types
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(i,)] = constants[name]
            continue
        signature[name] = known_types.get(name, "*fp32")
        # A launch detects this itself: memory of torch is aligned, and so are depths and strides.
        if name not in UNALIGNED and signature[name][0] in "*i":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shown = {name: constants[name] for name in SHOWN if name in constants}
    if "q" in types:
        shown["dtype"] = types["q"].removeprefix("*")
    counts = analyse(compiled.asm["cubin"])
    return {"kernel": kernel.__name__, **shown, "shared": compiled.metadata.shared, **counts}


def analyse(cubin: bytes) -> dict[str, int]:
    """Return the registers, the stack bytes and the counted instructions of machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dump(option: str) -> str:
        command = [str(tool), option, file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dump("--dump-resource-usage")
        code = dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in COUNTED}
    return {"registers": int(found[1]), "stack": int(found[2]), **counts}


def last_forms() -> list[Form]:
    """Return the last form of each kernel and dtype: the most features, or the widest heads."""
    last: dict[tuple[str, str | None], Form] = {}
    for form in launched():
        kernel, types, _, _ = form
        last[kernel.__name__, types.get("q")] = form
    return list(last.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for a Hopper GPU.")
    parser.add_argument("--last", action="store_true", help="only the last form of each")
    forms = last_forms() if parser.parse_args().last else launched()
    rows = [compile_for_hopper(*form) for form in forms]
    print(f"triton {triton.__version__}, sm_90")
    print(f"{'':52s}{'registers':>10s}{'stack':>6s}{'shared':>8s}", *COUNTED)
    for row in rows:
        form = " ".join(f"{n}={row[n]:d}" for n in SHOWN if n in row)
        counts = " ".join(f"{row[name]:{len(name)}d}" for name in COUNTED)
        name = " ".join(filter(None, (row["kernel"], row.get("dtype"), form)))
        print(f"{name:52s}{row['registers']:10d}{row['stack']:6d}{row['shared']:8d} {counts}")
    print(json.dumps({"triton": triton.__version__, "kernels": rows}))


if __name__ == "__main__":
    main()
