"""OpenVINO GenAI's continuous batching on the CPU; the model is an OpenVINO export."""

import time

import numpy as np
import openvino
import openvino_genai


def version() -> str:
    return openvino_genai.__version__


class Engine:
    def __init__(self, model: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        options = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", options)

    def run(self, prompts: list[list[int]], new_tokens: int) -> float:
        ids = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        config = openvino_genai.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, do_sample=False
        )
        start = time.perf_counter()
        self.pipeline.generate(ids, [config] * len(ids))
        return time.perf_counter() - start
