"""Structs that cpu_engine.py passes to csrc/decoder.cpp and csrc/sampling.cpp.

Each struct mirrors a C++ struct, which documents the fields. The sizes of both are compared when
the library is loaded.
"""

import ctypes
from collections.abc import Sequence

from expo_fast.op_backends.native_library import struct_fields


class LayerStruct(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "before_attention after_attention before_mlp after_mlp"),
        *struct_fields(ctypes.c_void_p, "q_norm k_norm"),
        *struct_fields(ctypes.c_void_p, "q k v o gate up down"),
        *struct_fields(ctypes.c_void_p, "q_bias k_bias v_bias o_bias gate_bias up_bias down_bias"),
        ("window", ctypes.c_int64),
        ("rope", ctypes.c_int32),
    ]


class DecoderStruct(ctypes.Structure):
    _fields_: Sequence = [
        ("layers", ctypes.POINTER(LayerStruct)),
        *struct_fields(ctypes.c_void_p, "embedding norm"),
        *struct_fields(ctypes.c_int64, "n_layers hidden intermediate heads kv_heads head_dim"),
        *struct_fields(ctypes.c_int64, "rotary_dim rope_sets"),
        *struct_fields(ctypes.c_float, "eps norm_offset"),
        *struct_fields(
            ctypes.c_float, "attention_scale embedding_scale residual_scale logit_scale"
        ),
        *struct_fields(ctypes.c_int32, "activation norms_all_heads dtype"),
    ]


class RowsStruct(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "tokens positions tables cos sin pages workspace out"),
        *struct_fields(ctypes.c_int64, "n table_stride n_positions"),
        ("threads", ctypes.c_int32),
    ]


class DrawStruct(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "hidden weight temperature seeds positions"),
        *struct_fields(ctypes.c_void_p, "token logp logits workspace"),
        *struct_fields(ctypes.c_int64, "n v d"),
        *struct_fields(ctypes.c_int32, "dtype threads"),
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {  # by their names in EXPO_FAST_SIZEOF of csrc
    "layer": LayerStruct,
    "decoder": DecoderStruct,
    "rows": RowsStruct,
    "draw": DrawStruct,
}
