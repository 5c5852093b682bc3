"""Models of images, sound, video and time series beyond the thirty; see zoo_text.py."""

from __future__ import annotations

from tests.models.architecture import Architecture
from tests.models.inputs import (
    AUDIO_FRAMES,
    IMAGE_SIZE,
    MEL_BINS,
    PATCH_SIZE,
    image,
    latents,
    sound,
    squared_patches,
    steps,
    time_series,
    tokens_of_an_image,
    video,
    waveform,
)
from tests.models.tiny import BERT, VISION

_SWIN = {
    "image_size": 2 * IMAGE_SIZE,
    "patch_size": PATCH_SIZE // 2,
    "embed_dim": 32,
    "depths": [2],  # the second layer's windows are shifted
    "num_heads": [2],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
_NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
_WAVEFORM = {
    **_NO_DROPOUT,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}

VISION_AND_SOUND: tuple[Architecture, ...] = (
    Architecture("swin", 2, _SWIN, "none", image),
    Architecture("swinv2", 2, _SWIN, "none", image),
    Architecture(
        "sam_vision_model",
        2,  # layer 0 in windows; decomposed relative positions along rows and columns
        {
            **VISION,
            "output_channels": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
            "mlp_dim": 96,
        },
        "none",
        image,
    ),
    Architecture(
        "beit",
        2,
        {**VISION, "use_relative_position_bias": True, "drop_path_rate": 0.0},
        "none",
        image,
    ),
    Architecture(
        "segformer",
        2,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [3, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "drop_path_rate": 0.0,
        },
        "none",
        image,
    ),
    Architecture(
        "blip_2_vision_model", 2, VISION, "none", image, model_class="blip_2.Blip2VisionModel"
    ),
    Architecture(
        "internvl_vision",
        2,
        {**VISION, "image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2},
        "none",
        image,
    ),
    Architecture(
        "llama4_vision_model",
        2,
        {
            **VISION,
            "intermediate_size": 256,
            "image_size": 4 * PATCH_SIZE,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        "none",
        squared_patches,
        model_class="llama4.Llama4VisionModel",
    ),
    Architecture(
        "idefics2_perceiver",
        2,
        {
            "hidden_size": 64,
            "resampler_n_latents": 6,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        "right",
        latents,
        model_class="idefics2.Idefics2PerceiverResampler",
    ),
    Architecture(
        "vjepa2",
        4,  # two layers of the encoder, two of the predictor
        {
            "patch_size": PATCH_SIZE,
            "crop_size": IMAGE_SIZE,
            "frames_per_clip": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "pred_hidden_size": 64,
            "pred_num_attention_heads": 4,
            "pred_num_hidden_layers": 2,
            "num_pooler_layers": 1,
        },
        "none",
        video,
    ),
    Architecture(
        "timesfm",
        2,
        {
            "patch_length": 8,
            "horizon_length": 8,
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "head_dim": 16,
            "num_attention_heads": 4,
        },
        "none",
        time_series,
    ),
    Architecture(
        "phi4_multimodal_audio",
        2,
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_blocks": 2,
            "num_attention_heads": 4,
            "chunk_size": 4,
            "left_chunk": 1,
            "input_size": MEL_BINS,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 16,
            "time_reduction": 4,
        },
        "none",
        sound,
        model_class="phi4_multimodal.Phi4MultimodalAudioModel",
    ),
    Architecture("wav2vec2", 2, _WAVEFORM, "none", waveform),
    Architecture("wavlm", 2, _WAVEFORM, "none", waveform),
    Architecture(
        "wav2vec2-conformer", 2, {**_WAVEFORM, "conv_depthwise_kernel_size": 3}, "none", waveform
    ),
    Architecture(
        "audio-spectrogram-transformer",
        2,
        {
            **VISION,
            "frequency_stride": 4,
            "time_stride": 4,
            "max_length": AUDIO_FRAMES,
            "num_mel_bins": MEL_BINS,
            "patch_size": 4,
        },
        "none",
        steps,
    ),
    Architecture(
        "layoutlmv3",
        2,
        {
            **BERT,
            "visual_embed": False,
            "coordinate_size": 8,
            "shape_size": 16,
            "has_relative_attention_bias": True,
            "has_spatial_attention_bias": True,
            "rel_pos_bins": 8,
            "rel_2d_pos_bins": 8,
            "max_rel_pos": 16,
            "max_rel_2d_pos": 32,
            "max_2d_position_embeddings": 128,
        },
        "right",
        tokens_of_an_image,
    ),
)
