"""fvlm: predict a video's next frame in a space better than pixels, and find out whether it worked."""
from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that defines it. A module is imported when one of its names is first asked for, so that
# `import fvlm` costs no torch. tests/test_repo.py checks that every name is there.
_NAMES = {
    name: module
    for module, names in {
        "core": "InputError ShapeError NonFiniteError ConfigError WeightsError VideoError cache_dir generator",
        "data.wheel_store": "WheelFile sample_clips",
        "data.frame_requests": "frame_indices",
        "data.video": "VideoInfo Clip probe read_clip",
        "data.worlds": "MovingDigits BouncingSprites CuedTarget PhotoPan",
        "data.cards": "load_card list_cards",
        "data.dataset": "open_dataset",
        "data.clips": "VideoFolder",
        "data.clip_cache": "ClipCache",
        "data.moving_mnist": "MovingMNIST",
        "data.embedding_cache": "EmbeddingCache",
        "encoders.embedding_windows": "EmbeddingWindows Standardiser",
        "encoders.embeddings": "FrameEmbedder",
        "encoders.keys_values": "KeysValues VisionEncoder",
        "encoders.latents": "load_codec",
        "encoders.language_model": "LanguageModel",
        "blocks.self_attention": "MHSA",
        "blocks.scmhsa": "SCMHSA FoldedSCMHSA",
        "blocks.residual_quantizer": "HierarchicalResidualQuantizer",
        "blocks.query_attention": "QueryAttention",
        "blocks.pixelcnn": "SpatiotemporalPixelCNN",
        "blocks.prediction_heads": "FiLMHead SpatialFiLMHead MLPHead CrossAttentionHead SpatialTransformerHead",
        "objectives.losses": "semantic_similarity_loss entropy_margin_loss contrastive_loss caption_loss",
        "models.baselines": "CopyLast LinearExtrapolation RidgeRegression",
        "models.sc_vfp": "SCVFP SCVFPConfig",
        "models.foveation_config": "FoveationConfig",
        "models.foveated_vlm": "FoveatedVLM",
        "models.hr_vqvae": "HRVQVAE HRVQVAEConfig",
        "models.s_hr_vqvae": "SHRVQVAE",
        "models.rivals": "ConvLSTM SimVP",
        "training.loop": "train TrainConfig TrainResult",
        "training.checkpoints": "save_checkpoint load_checkpoint",
        "evidence.statistics": "paired_bootstrap sign_flip_test holm",
        "evidence.foveation_protocol": "foveation_protocol coarse_over_fine",
        "evidence.claims": "load_claims judge_claims",
        "instruments.diagnosis": "Diagnosis",
        "instruments.attention_cube": "AttentionCube",
        "instruments.attention_explorer": "AttentionExplorer",
        "instruments.attention_entropy": "attention_entropy",
        "instruments.head_tsne": "head_tsne",
        "instruments.feature_similarity": "feature_similarity",
        "instruments.bottleneck_tracer": "trace_bottleneck",
        "instruments.prediction_scrubber": "PredictionScrubber",
        "instruments.linked_view": "LinkedView",
        "app.report": "Report",
    }.items()
    for name in names.split()
}


def __getattr__(name):
    "The public name `name`, its module imported on first use."
    module = _NAMES.get(name)
    if module is None:
        raise AttributeError(f"module 'fvlm' has no attribute {name!r}; public names: {', '.join(sorted(_NAMES))}")
    value = getattr(import_module(f"fvlm.{module}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_NAMES})
