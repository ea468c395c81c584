"""Arguments that are not yet checked: of which, and whose checks are to come. The aim is an empty table.

Name of the constructor or function -> its arguments. An entry that is no longer needed fails the test.
`python -m tests.fuzz` prints the table as it is.
"""

KNOWN: dict[str, str] = {
    # averaging
    "EMA": "decay half_life widths warmup replace_at_end",
    "CheckpointAveraging": "alpha penalty preview folder replace_at_end",
    "uniform_weights": "steps",
    "linear_weights": "steps",
    "exponential_weights": "steps alpha",
    "wsm_weights": "steps decay",
    "weights_from_decay": "factors",
    "decay_from_weights": "weights",
    "loss_weights": "losses penalty",
    "step_weights": "steps penalty",
    "scheme_weights": "steps losses alpha decay penalty",
    "weighted_average": "weights dtype",
    "float32_copies": "device",
    "ema_update_": "decay",
    "half_life_decay": "half_life every_n_steps",
    "warmup_decay": "update decay inv_gamma power",
    "power_from_width": "sigma_rel",
    "width_from_power": "gamma",
    "power_decay": "step gamma every_n_steps",
    "posthoc_weights": "steps sigma_rels sigma_rel step",
    "posthoc_error": "steps sigma_rels sigma_rel step",
    # ZClip, GradES and MISA
    "MISA": "budget eta beta include exclude always momentum_step debias log_modules heat_map",
    "GradES": (
        "tau alpha include exclude prefix max_frozen_ratio stop_when_frozen release_state "
        "unfreeze_factor log_metric heat_map"
    ),
    "ZClip": "alpha z_thresh max_grad_norm eps clip_factor skip_update_on_spike log_statistics",
    "GradESConfig": "tau unfreeze_factor",
    "grades_update": "armed",
    "scale_": "zero_nonfinite",
    "statistics_dtype": "device",
    "importance": "beta mode interval",
    "debiased": "beta",
    "probabilities": "eta mode",
    "SamplerConfig": "budget eta beta debias",
    "Sampler": "sizes config total",
    "ZClipConfig": "alpha z_thresh max_grad_norm eps clip_factor skip_update_on_spike",
    "zclip_update": "on_nonfinite",
    # monitors, structure and compression
    "SpectralAlignmentMonitor": "threshold margin severity max_residual log_layers log_histograms heat_map",
    "CompressionMonitor": "relative_error",
    "TensorBoardLayout": "charts",
    "leading_singular_pair": "iterations",
    "alignment": "eps",
    "CollapseConfig": "threshold margin",
    "backward_flops": "model",
    "clean_named_modules": "model",
    "clean_named_parameters": "model",
    "find_block_parts": "model attention ffn",
    "find_blocks": "model",
    "select_matrices": "model include exclude",
    "all_gather_bytes": "payload world_size",
    "all_reduce_bytes": "payload world_size",
    "all_to_all_bytes": "payload world_size",
    "predict": "compressor shapes world_size dtype",
    "BF16": "start_step",
    "FP16": "start_step",
    "ArcTopK": "ratio rank eta start_step initial_ratio ratio_steps min_numel seed",
    "Int8": "start_step seed",
    "PowerSGD": "rank start_step min_numel seed",
    "RandK": "ratio eta start_step min_numel seed",
    "TopK": "ratio eta start_step min_numel",
    "CompressedDDPStrategy": "bucket_cap_mb",
    # TrainingGuard
    "TrainingGuard": "rules folder lr_factor min_severity",
    # fault tolerance and MeCeFO
    "FaultTolerantDDPStrategy": (
        "lighthouse heartbeat_timeout replica host collective_timeout connect_timeout quorum_timeout "
        "heal_timeout start_grace mecefo_rank mecefo_refresh_every mecefo_attention mecefo_ffn"
    ),
    "MeCeFO": "model attention ffn",
    "divisors": "owners",
    "leading_right_singular_vectors": "rank",
}
