"""What the authors' ZClip does to a few norms: for the method, and for the callback on the kernel."""

# Measured on the authors' code: norms 1.0 1.2 0.8 1.0 | 1.1 5.0; after the 5.0: its clipped norm, mean, variance.
GOLDEN = {
    "adaptive": (dict(max_grad_norm=None), 1.033777, 1.00392332, 0.01911854),
    "capped": (dict(max_grad_norm=1.0), 1.000000, 1.00392332, 0.01911854),
    "mean": (dict(max_grad_norm=None, clip_option="mean"), 1.003000, 1.00300002, 0.01909181),
    "percentile": (dict(max_grad_norm=None, clip_option="percentile"), 1.353734, 1.01352203, 0.02256413),
    "skip_update": (dict(max_grad_norm=None, skip_update_on_spike=True), 1.033777, 1.00300002, 0.01968227),
    "clip_factor": (dict(max_grad_norm=None, clip_factor=0.5), 0.516888, 0.98841667, 0.02576197),
}
