"""A tiny model of every architecture that the installed mlx-lm ships, made in memory.

`modules()` lists the architectures when it is called, so that one which a newer mlx-lm adds is
missing from `CONFIGS` instead of being passed over. Each configuration has every kind of layer that
its architecture can have, and windows, chunks and kernels that a prompt of 40 tokens goes past.
`SHAPES` are those of models that many people have, with fewer layers and narrower ones.

The weights are the same in every process: each array has a key of its own, made of its name.
"""

from __future__ import annotations

import copy
import importlib
import math
import pkgutil
import sys
import zlib
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten

VOCAB = 256
WINDOW = 16
CHUNK = 24

Config = dict[str, Any]

# Common parts. A configuration may name more than its architecture knows: `from_dict` takes what it
# knows, as it does of a real `config.json`.

BASE: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
MOE: Config = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
MLA: Config = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
YARN: Config = {
    "type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA4_SCALING: Config = {
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 32,
}
INDEXER: Config = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 12}
SLIDING: Config = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
}
GATED_DELTA: Config = {
    "num_hidden_layers": 3,
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
}
MAMBA2: Config = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}
GPT: Config = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 96,
    "n_ctx": 512,
    "n_positions": 512,
    "layer_norm_epsilon": 1e-5,
}
GRANITE: Config = {
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
MINICPM: Config = {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1.0}
KDA: Config = {
    "num_heads": 4,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3],
    "full_attn_layers": [2],
}
LFM2: Config = {
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
GEMMA4: Config = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "global_head_dim": 32,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
GEMMA3N: Config = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}
LLAMA4: Config = {
    "num_hidden_layers": 4,
    "attention_chunk_size": CHUNK,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 96,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "use_qk_norm": True,
}
LONGCAT: Config = {
    **MLA,
    "attention_method": "MLA",
    "ffn_hidden_size": 96,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 32,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "zero_expert_type": "identity",
    "num_layers": 2,
    "routed_scaling_factor": 1.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
BAILING: Config = {
    **MOE,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "use_qk_norm": True,
}
BAILING_LINEAR: Config = {
    **BAILING,
    "num_hidden_layers": 3,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "partial_rotary_factor": 0.5,
}

CONFIGS: dict[str, Config] = {
    # Dense, full attention in every layer
    "apertus": {"post_norm": False, "qk_norm": True},
    "bitnet": {},
    "cohere": {"logit_scale": 1.0, "use_qk_norm": True},
    "ernie4_5": {"use_bias": False},
    "exaone": {"num_layers": 2},
    "gemma": {},
    "gemma2": {"num_hidden_layers": 2, "query_pre_attn_scalar": 16.0},
    "glm": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": GRANITE,
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "lille-130m": {**GPT, "block_size": 512, "n_kv_heads": 2, "layer_norm_eps": 1e-5},
    "mimo": {},
    "minicpm": MINICPM,
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "num_hidden_layers": 4,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    },
    "olmo": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "mlp_hidden_size": 96,
        "embedding_size": VOCAB,
    },
    "olmo2": {},
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    "phi": {},
    "phi3": {},
    "phi3small": {
        "num_hidden_layers": 2,
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
    },
    "plamo": {"n_shared_head": 2},
    "qwen": {"num_key_value_heads": 4, "kv_channels": 16},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "starcoder2": {},
    "talkie": {},
    "telechat3": {},
    # The same, with layers that run more than once or share keys and values
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "nanbeige": {"num_loops": 2},
    # Sliding and full attention
    "cohere2": {"logit_scale": 1.0, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "exaone4": {**SLIDING, "sliding_window_pattern": "LG"},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
    },
    "gemma4_text": GEMMA4,
    "llama": SLIDING,
    "ministral3": {**SLIDING, "rope_parameters": LLAMA4_SCALING},
    "muse_glimmer": {**SLIDING, "output_multiplier": 1.0},
    "olmo3": SLIDING,
    "plamo3": {"num_hidden_layers": 3, "window_size": WINDOW, "sliding_window_pattern": 2},
    "spark2_5": {
        **SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 10000.0},
            "full_attention": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    },
    # Chunked and full attention
    "llama4": {"text_config": {**BASE, **LLAMA4}},
    "llama4_text": {**LLAMA4, "no_rope_layers": [1, 1, 1, 0]},
    # Experts
    "Klear": {**MOE, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "bailing_moe": BAILING,
    "dbrx": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": MOE,
    "dots1": MOE,
    "ernie4_5_moe": {
        "use_bias": False,
        "moe_num_experts": 4,
        "moe_layer_start_index": 1,
        "moe_intermediate_size": 32,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "glm4_moe": {**MOE, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    "granitemoe": {**GRANITE, **MOE},
    "hunyuan": {
        **MOE,
        "num_hidden_layers": 4,
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 2.0, "factor": 1.0, "type": "dynamic"},
    },
    "minimax": {**MOE, "shared_intermediate_size": 32, "rotary_dim": 8},
    "mixtral": MOE,
    "olmoe": MOE,
    "phimoe": {
        **MOE,
        "rope_scaling": {
            "long_factor": [1.5] * 8,
            "short_factor": [1.0] * 8,
            "long_mscale": 1.0,
            "short_mscale": 1.0,
        },
    },
    "phixtral": {
        "num_vocab": VOCAB,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 8,
    },
    "qwen2_moe": MOE,
    "qwen3_moe": {**MOE, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "solar_open": {**MOE, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    # Experts, sliding and full attention
    "afmoe": {**MOE, **SLIDING, "num_dense_layers": 1},
    "exaone_moe": {**MOE, **SLIDING, "is_moe_layer": [False, True, True]},
    "gpt_oss": {**MOE, **SLIDING},
    "laguna": {**MOE, **SLIDING},
    "mellum": {
        **MOE,
        **SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "mimo_v2_flash": {
        **MOE,
        "num_hidden_layers": 3,
        "hybrid_layer_pattern": [0, 1, 1],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "v_head_dim": 16,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.5,
    },
    "step3p5": {
        **MOE,
        **SLIDING,
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
        "moe_layers_enum": "1,2",
    },
    # Latent attention
    "deepseek_v2": {**MLA, **MOE, "rope_scaling": YARN},
    "deepseek_v3": {**MLA, **MOE},
    "glm4_moe_lite": {**MLA, **MOE},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {
        **LONGCAT,
        "ngram_vocab_size_ratio": 3,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "minicpm3": {
        **MLA,
        **MINICPM,
        "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.5] * 4},
    },
    "mistral4": {**MLA, **MOE, "rope_parameters": LLAMA4_SCALING},
    "youtu_llm": MLA,
    # Sparse attention, whose indexer has rows of its own
    "deepseek_v32": {**MLA, **MOE, **INDEXER},
    "deepseek_v41": {
        **MOE,
        "num_hidden_layers": 4,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": WINDOW,
        "compress_ratios": [0, 1, 4, 4],
        "kv_source_layer_ids": [1, 2],
        "index_source_layer_ids": [1, 2, 3],
        "candidate_source_layer_id": 2,
        "candidate_topk_blocks": 3,
        "candidate_block_size": 2,
        **INDEXER,
        "index_topk": 6,
    },
    "glm_moe_dsa": {**MLA, **MOE, **INDEXER, "rope_parameters": {"rope_theta": 10000.0}},
    "minimax_m3_vl": {
        "text_config": {
            **BASE,
            **MOE,
            "moe_layer_freq": [0, 1, 1],
            "num_hidden_layers": 3,
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 32,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 8,
            "index_topk_blocks": 2,
            "layer_types": ["full_attention", "sparse", "sparse"],
        }
    },
    # Recurrent
    "mamba": {
        "intermediate_size": 128,
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "mamba2": {
        "intermediate_size": 64,
        "num_heads": 4,
        "state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.0, 100.0),
        "time_step_rank": "auto",
    },
    "rwkv7": {
        "head_dim": 32,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    # Recurrent or convolutions, and attention
    "baichuan_m1": {
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "sliding_window_layers": [0, 2],
        "conv_window": 2,
    },
    "bailing_hybrid": {**BAILING_LINEAR, **MLA},
    "bailing_moe_linear": BAILING_LINEAR,
    "bailing_moe_v3": {
        **BAILING_LINEAR,
        **MLA,
        "moe_shared_expert_intermediate_size": 32,
        "short_conv_kernel_size": 4,
        "head_dim": 32,
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 1.0},
    "gear": {
        **SLIDING,
        "layer_types": ["sliding_attention", "conv_mixer", "full_attention"],
    },
    "granitemoehybrid": {
        **GRANITE,
        **MOE,
        **MAMBA2,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 32,
    },
    "jamba": {
        **MOE,
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
    "kimi_linear": {
        **MLA,
        **MOE,
        "num_hidden_layers": 3,
        "linear_attn_config": KDA,
        "model_max_length": 4096,
        "num_experts_per_token": 2,
        "moe_layer_freq": 1,
    },
    "lfm2": LFM2,
    "lfm2_moe": {**LFM2, **MOE, "use_expert_bias": True, "num_dense_layers": 1},
    "nemotron_h": {
        **MOE,
        "hybrid_override_pattern": "M*-E",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {
        **GATED_DELTA,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 4,
        "linear_allow_neg_eigval": True,
    },
    "plamo2": {
        "num_hidden_layers": 4,
        "hidden_size_per_head": 16,
        "mamba_d_state": 8,
        "mamba_num_heads": 4,
        "mamba_step": 2,
    },
    "qwen3_next": {**MOE, **GATED_DELTA, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    # Wrappers of a language model, without eyes
    "gemma3": {
        "text_config": {
            **BASE,
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 16,
        },
    },
    "gemma3n": {"text_config": {**BASE, **GEMMA3N}},
    "gemma4": {"text_config": {**BASE, **GEMMA4}},
    "kimi_k25": {"text_config": {**BASE, **MLA, **MOE}},
    "kimi_k3": {
        "text_config": {
            **BASE,
            **MLA,
            **MOE,
            "num_hidden_layers": 3,
            "linear_attn_config": KDA,
            "num_experts_per_token": 2,
            "attn_res_block_size": 2,
            "mla_use_output_gate": True,
            "routed_expert_hidden_size": 32,
            "latent_moe_use_norm": True,
        }
    },
    "kimi_vl": {"text_config": {**BASE, **MLA, **MOE}},
    "lfm2-vl": {"text_config": {**BASE, **LFM2}},
    "mistral3": {"text_config": {**BASE, **SLIDING}},
    "muse_spark": {
        "text_config": {
            **BASE,
            **SLIDING,
            **MOE,
            "num_shared_experts": 0,
            "post_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0},
            "layer_rope_theta": [10000.0, 0.0, 10000.0],
            "final_logit_softcapping": 20.0,
            "output_multiplier": 1.0,
            "moe_hidden_size": 32,
        }
    },
    "pixtral": {"text_config": {**BASE, **SLIDING}},
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "block": block, "embedding": "embed" in path, "dtype": "float16"}
            for path, block in {
                "model.embed_tokens": 0,
                "model.layers.0.mlp.down_proj": 512,
                "model.layers.1.mlp.down_proj": 512,
                "model.layers.1.self_attn.q_proj": 0,
            }.items()
        ],
        "text_config": {**BASE, **GATED_DELTA, "hidden_size": 128, "intermediate_size": 512},
    },
    "qwen2_vl": {"text_config": BASE},
    "qwen3_5": {"text_config": {**BASE, **GATED_DELTA}},
    "qwen3_5_moe": {"text_config": {**BASE, **GATED_DELTA, **MOE}},
    "qwen3_vl": {"text_config": BASE},
    "qwen3_vl_moe": {
        "text_config": {**BASE, **MOE, "decoder_sparse_step": 1, "mlp_only_layers": [0]}
    },
}

# Shapes of models that many people have: their ratios and flags, not their sizes.

LLAMA_3_1: Config = {  # 8B: 4,096 wide, 32 heads of 128, 8 for keys and values
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
QWEN3: Config = {  # 0.6B: 1,024 wide, 16 heads of 128 (twice the width), 8 for keys and values
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
MINIMIND: Config = {
    "vocab_size": 6400,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "head_dim": 16,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
MINIMIND_2: Config = {  # 512 wide; saved as a llama, which names no size of the heads
    **MINIMIND,
    "intermediate_size": 384,
    "num_key_value_heads": 2,
    "head_dim": None,
    "rms_norm_eps": 1e-5,
}
MINIMIND_3: Config = {  # 768 wide; saved as a qwen3, or a qwen3_moe
    **MINIMIND,
    "intermediate_size": 448,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": None,
}

SHAPES: dict[str, tuple[str, Config]] = {
    "Llama 3.1": ("llama", LLAMA_3_1),
    "MiniMind 2, saved as a llama": ("llama", MINIMIND_2),
    "MiniMind 3, saved as a qwen3": ("qwen3", MINIMIND_3),
    "MiniMind 3 with experts, saved as a qwen3_moe": (
        "qwen3_moe",
        {
            **MINIMIND_3,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 448,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "Qwen 3": ("qwen3", QWEN3),
}
"""By name, the architecture and the configuration of models, made smaller."""

# Rows that MLX can quantise have 32 items, or a multiple of that.

WIDE: Config = {
    "global_head_dim": 32,
    "head_dim": 32,
    "hidden_size_per_head": 32,
    "index_head_dim": 32,
    "kv_channels": 32,
    "kv_lora_rank": 32,
    "n_head": 2,
    "n_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "swa_head_dim": 32,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_v_head_dim": 32,
    "v_head_dim": 32,
}
WIDE_CONFIGS: dict[str, Config] = {
    "afm7": {"num_heads": 2, "num_kv_heads": 1},
    "minicpm3": {"rope_scaling": {"short_factor": [1.0] * 16, "long_factor": [1.5] * 16}},
    "nemotron-nas": {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32},
    "phimoe": {
        "rope_scaling": {
            "long_factor": [1.5] * 16,
            "short_factor": [1.0] * 16,
            "long_mscale": 1.0,
            "short_mscale": 1.0,
        },
    },
    "phixtral": {"num_heads": 2},
}
"""What `WIDE` cannot say: names and lists that mean something else elsewhere."""

KNOWN_BROKEN: dict[str, str] = {
    "bitnet": "[metal_kernel] No Metal back-end.",
    "muse_spark": "[metal_kernel] No Metal back-end.",
    "olmo": "Cannot perform inplace addition on an mlx.core.array and str",
}
"""Architectures that mlx-lm itself cannot run on a CPU, and what it says."""

DEPEND_ON_PASSES: dict[str, str] = {
    "phi3small": "adds its boolean mask to the scores: a token sees those after it in its block",
    "plamo3": "its mask is one token wider than what its RotatingKVCache keeps of earlier passes",
}
"""Architectures whose logits are not the same, but for rounding, where passes end elsewhere."""

DEPENDS_ON_CACHE: dict[str, str] = {
    "gemma3n": "layers that share keys and values compute their own where there is no cache",
}
"""Architectures whose logits are others without a cache than with an empty one."""

UNWRITTEN: dict[str, str] = {
    "nemotron-nas": "has a KVCache for a layer without attention, and never writes to it",
}
"""Architectures with an object that holds no rows, so that where one is kept counts."""

DECAYS = ("dt_bias", "dt_proj.bias", "recurrent_param", "w_lora.lora.2.bias")
"""Parameters that say how fast recurrent layers forget: slowly, as trained ones do."""

PROBES = ("hf_olmo",)
"""Packages that mlx-lm's modules only import to see whether they are there."""


def modules() -> list[str]:
    """The names of the architectures that the installed mlx-lm has."""
    found = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return sorted(n for n in found if {"Model", "ModelArgs"} <= vars(_module(n)).keys())


def runnable() -> list[str]:
    """The architectures that run here, and then the shapes of known models."""
    return [*(name for name in modules() if name not in broken()), *SHAPES]


def is_known(name: str) -> bool:
    """Whether somebody has written a configuration."""
    return name in CONFIGS or name in SHAPES


def broken() -> dict[str, str]:
    """Of the architectures that mlx-lm cannot run on a CPU, those that it cannot run here."""
    metal = mx.metal.is_available()
    return {name: why for name, why in KNOWN_BROKEN.items() if not (metal and "Metal" in why)}


def build(name: str, *, wide: bool = False) -> Any:
    """A model of an architecture or a shape, in float32, with weights that depend on nothing but
    its name. A `wide` one has fewer and wider heads, whose rows MLX can quantise.
    """
    module = _module(architecture_of(name))
    model = module.Model(module.ModelArgs.from_dict(config_of(name, wide=wide)))
    parameters: list[Any] = list(tree_flatten(model.parameters()))
    weights = [(path, _weight(path, array)) for path, array in parameters]
    model.update(tree_unflatten(weights))
    if name == "phi3small":  # these are ids of its own vocabulary, far beyond the end of ours
        model._dummy_tokenizer_ids = mx.arange(VOCAB - 6, VOCAB)
    model.eval()
    mx.eval(model.parameters())
    return model


def architecture_of(name: str) -> str:
    """The architecture of a shape; an architecture is its own."""
    return SHAPES[name][0] if name in SHAPES else name


def config_of(name: str, *, wide: bool = False) -> Config:
    """What would be in the `config.json` of such a model.

    Raises:
        LookupError: this mlx-lm has an architecture that nobody has written one for.
    """
    known = SHAPES[name][1] if name in SHAPES else CONFIGS.get(name)
    if known is None:
        raise LookupError(f"mlx-lm has {name}: add a tiny configuration of it to CONFIGS")
    config = copy.deepcopy({**BASE, **known, "model_type": architecture_of(name)})
    if "text_config" in config:
        config["text_config"].setdefault("model_type", f"{name}_text")
    return {**_widened(config), **WIDE_CONFIGS.get(name, {})} if wide else config


def _widened(config: Config) -> Config:
    return {
        key: _widened(value) if isinstance(value, dict) else WIDE.get(key, value)
        for key, value in config.items()
    }


def _module(name: str) -> ModuleType:
    missing = {probe: ModuleType(probe) for probe in PROBES if probe not in sys.modules}
    sys.modules.update(missing)
    try:
        return importlib.import_module(f"mlx_lm.models.{name}")
    finally:
        for probe in missing:
            del sys.modules[probe]


def _weight(path: str, array: mx.array) -> mx.array:
    """Random weights in place of an array: a matrix keeps the size of what goes through it."""
    key = mx.random.key(zlib.crc32(path.encode()))
    kind = path.rpartition(".")[2]
    if array.dtype == mx.uint32 and kind == "weight":  # packed
        return mx.random.randint(0, 1 << 32, array.shape, mx.int64, key=key).astype(mx.uint32)
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    if kind in {"scales", "biases"}:  # of packed weights between 0 and 3
        step = 1.3 / math.sqrt(array.shape[-1] * 128)
        return mx.full(array.shape, step if kind == "scales" else -1.5 * step, mx.float32)
    noise = mx.random.normal(array.shape, key=key)
    if kind == "A_log":
        return mx.log(mx.random.uniform(1.0, 16.0, array.shape, key=key))
    if path.endswith(DECAYS):
        return noise - 4
    if kind == "signs":
        return mx.sign(noise)
    if array.ndim <= 1:
        start = mx.zeros(array.shape) if kind == "bias" else array
        return start.astype(mx.float32) + 0.1 * noise
    if "embed" in path and array.ndim == 2:
        return noise
    fan_in = array.size // array.shape[0] if "conv" in path else array.shape[-1]
    return noise * (1.5 / math.sqrt(fan_in))
