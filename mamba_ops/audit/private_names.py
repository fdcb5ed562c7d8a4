"""The private names of torch that the audit and the commands use through `_torch.py`, and what is lost without each."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Private:
    """A private name.

    Attributes:
        loss: what the audit does without it.
        also_in: further modules that hold the same function under the same name.
    """

    loss: str
    also_in: tuple[str, ...] = ()


BREAKS = "torch._dynamo.symbolic_convert:InstructionTranslatorBase.log_graph_break"
GRAPHS = "torch._dynamo.output_graph:OutputGraph.call_user_compiler"
RECOMPILES = "torch._dynamo.guards:get_and_maybe_log_recompilation_reasons"
FAILURES = "torch._dynamo.convert_frame:exception_handler"
LOOPS = "torch._dynamo.symbolic_convert:InstructionTranslatorBase.maybe_has_backedge"
CALLS = "torch._dynamo.symbolic_convert:InstructionTranslatorBase.call_function"
CUDA_GRAPHS = "torch._inductor.cudagraph_utils:log_cudagraph_skip_and_bump_counter"
COPIES = "torch._inductor.compile_fx:post_grad_passes"
HAS_TRITON = "torch.utils._triton:has_triton"
_ABSENT = "absent devices are not traced; audit on the device itself, or with --device cpu"
_INDUCTOR = "torch._inductor.compile_fx", "torch._inductor.cudagraph_trees", "torch._inductor.output_code"

PRIVATE = {
    BREAKS: Private("graph breaks are read from torch's own lists, with less detail"),
    GRAPHS: Private("graphs are counted, but what is in them is not seen"),
    RECOMPILES: Private("recompiles are read from torch's metrics, with less detail", ("torch._dynamo.convert_frame",)),
    FAILURES: Private("errors of the compiler that a script catches are not seen"),
    LOOPS: Private("what stands behind a break in a loop is not seen until that is mended"),
    CALLS: Private("what stands behind an error of the compiler is not seen until that is mended"),
    CUDA_GRAPHS: Private("reasons why no CUDA graph is recorded are not seen", _INDUCTOR),
    COPIES: Private("copies for mutated inputs are not looked for"),
    HAS_TRITON: Private("launches of Triton kernels may be missing from graphs for absent devices"),
    "torch._dynamo.exc:unimplemented": Private("what stands behind an error of the compiler is not seen"),
    "torch._dynamo.exc:Unsupported": Private("graph breaks are classified by their messages alone"),
    "torch._dynamo:config": Private("no flags are tried, and behind breaks in long loops nothing is seen"),
    "torch._dynamo.decorators:mark_dynamic": Private("no sizes are marked dynamic for a try"),
    "torch._dynamo.decorators:mark_unbacked": Private("no sizes are marked unbacked for a try"),
    "torch._dynamo.config:recompile_limit": Private("it is taken to be 8"),
    "torch._dynamo.guards:GuardManagerWrapper": Private("of the guards that failed, one of each version is told"),
    "torch._dynamo.utils:counters": Private("graphs are not counted by the commands"),
    "torch._dynamo.utils:graph_break_reasons": Private("graph breaks of absent devices are not listed"),
    "torch._dynamo.utils:get_compilation_metrics": Private("recompiles of absent devices are not listed"),
    "torch._dynamo.utils:clear_compilation_metrics": Private("torch keeps the metrics of earlier compiles"),
    "torch._dynamo.utils:set_compilation_metrics_limit": Private("of large models the first recompiles may be missing"),
    "torch._dynamo.callback:callback_handler": Private("no seconds of compiles, no count of CUDA graphs recorded"),
    "torch._dynamo.backends.common:aot_autograd": Private("graphs of absent devices are not lowered by AOTAutograd"),
    "torch._dynamo.variables:ctx_manager": Private("`with torch.cuda.device(...)` breaks graphs for absent devices"),
    "torch._guards:TracingContext.extract_stack": Private("graph breaks of user errors have no line"),
    "torch._guards:TracingContext.try_get": Private("inputs that a graph writes to are not seen"),
    "torch._guards:CompileContext.current_compile_id": Private("graphs have no compile ids"),
    "torch._higher_order_ops.triton_kernel_wrap:kernel_side_table": Private("raw Triton launches have no names"),
    "torch._logging:_internal": Private("tlparse is given no trace"),
    "torch._ops:OpOverload._schema": Private("ops are not compared with their schemas"),
    "torch.fx:Node._pretty_print_target": Private("functions in traces have no module names"),
    "torch.fx.experimental.proxy_tensor:CONSTANT_NUMEL_LIMIT": Private("small constants may stop traces"),
    "torch.fx.experimental.symbolic_shapes:ShapeEnv": Private("while_loop may stop traces for absent devices"),
    "torch.nn:Module._apply": Private("modules that a script moves to an absent device may not be traced"),
    "torch.storage:UntypedStorage._cdata": Private("memory is identified by its address"),
    "torch.utils._python_dispatch:TorchDispatchMode": Private("waits and writes inside ops are not seen"),
    "torch.utils._pytree:tree_leaves": Private("tensors are found in tuples, lists and dicts alone"),
    "torch.utils._pytree:tree_map_only": Private("tensors are replaced in tuples, lists and dicts alone"),
    "torch._subclasses.fake_tensor:FakeTensor": Private(_ABSENT),
    "torch._subclasses.fake_tensor:FakeTensorMode": Private(_ABSENT),
    "torch._subclasses.fake_tensor:FakeTensorMode.avoid_device_init": Private("a device that is present may be needed"),
    "torch._subclasses.fake_tensor:init_gpu_context": Private("a device that is present may be needed"),
    "torch._subclasses.fake_tensor:unset_fake_temporarily": Private("traces that need values stop there"),
    "torch._subclasses.fake_tensor:DataDependentOutputException": Private("traces that need values end as errors"),
    "torch._subclasses.fake_tensor:DynamicOutputShapeException": Private("traces that need values end as errors"),
}
