from .step import ModuleMemory, StepMemory, measure_step

__all__ = ["ModuleMemory", "StepMemory", "measure_step"]
