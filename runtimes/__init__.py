"""The device side: sessions, samplers, the loop, the pipeline and the bundle format. No torch, ever."""
