"""What `make test` leaves to `make test-all`, so that it ends in time on two cores.

Of the tests in `ONE_CASE_IN_FOUR` it runs every fourth case, of those in `ONE_CASE_IN_EIGHT` every eighth, of those in
`FIRST_CASE` the first, of those in `NOT_DAILY` none. Each is named by file and function, and is dear for what it adds
to the others.
"""

from collections import Counter
from collections.abc import Iterable

import pytest

ONE_CASE_IN_FOUR = (
    "compile_tests/test_layers.py::test_decoding_is_one_graph",
    "compile_tests/test_layers.py::test_prefill_without_caches_is_one_graph",
    "compile_tests/test_ops.py::test_compiled_equals_eager_in_one_graph",
    "compile_tests/test_ops.py::test_no_copy_of_a_cache",
    "compile_tests/test_ops.py::test_opcheck",
    "compile_tests/test_ops.py::test_swaps_of_all_backends_keep_the_graph_and_the_bits",
    "tests/test_layers.py::test_nothing_is_half_updated",
    "tests/test_mutants.py::test_planted_bug_is_caught",
    "tests/test_numerics.py::test_against_the_oracle",
    "tests/test_numerics.py::test_dtype_pairs",
    "tests/test_strong_decay.py::test_it_is_the_recurrence",
    "tests/training/test_gradients.py::test_against_the_oracle",
    "tests/training/test_gradients.py::test_packed_rows_are_as_alone",
    "tests/training/test_gradients.py::test_the_same_bits_again_and_in_company",
    "tests/training/test_training.py::test_opcheck",
)
ONE_CASE_IN_EIGHT = ("tests/test_bad_input.py::test_compiled_code_refuses_in_the_same_words",)
FIRST_CASE = (
    "compile_tests/test_cold_start.py::test_in_a_whole_models_graph_all_layers_look_alike",
    "compile_tests/test_layers.py::test_decoding_copies_no_cache",
    "compile_tests/test_layers.py::test_packed_prefill_is_one_graph",
    "compile_tests/test_layers.py::test_prefill_into_slots_is_one_graph",
    "compile_tests/test_layers.py::test_transformers_decodes_in_one_graph",
    "compile_tests/test_layers.py::test_transformers_reads_prompts_in_one_graph",
    "compile_tests/test_plans.py::test_mixed_batches_are_one_graph_for_an_absent_device",
    "compile_tests/test_plans.py::test_thirty_mixed_batches_are_one_graph",
    "tests/registry/test_private_names.py::test_without",
    "tests/test_backend_mamba_ssm.py::test_the_convolution",
    "tests/test_backend_mamba_ssm.py::test_the_selective_scan",
    "tests/test_backend_plugin.py::test_the_environment_selects_it",
    "tests/test_bad_input.py::test_gradients_are_refused_in_eager_and_compiled",
    "tests/test_check_op.py::test_a_fault_of_one_backend_is_its_own",
    "tests/test_check_op.py::test_a_planted_fault_is_found",
    "tests/test_cli.py::test_a_missing_extra_is_named",
    "tests/test_numerics.py::test_a_row_does_not_depend_on_the_others",
    "tests/test_serving.py::test_every_step_is_as_in_the_eager_model",
    "tests/training/test_planted_bugs.py::test_planted_bug_is_caught",
)
NOT_DAILY = (
    "compile_tests/test_absent.py::test_a_module_of_both_ops_is_one_graph",
    "compile_tests/test_layers.py::test_each_is_one_graph_for_an_absent_device",
    "tests/audit/test_command.py::test_in_time_a_child_says_what_this_process_would_say",
    "tests/test_absent.py::test_sizes_seen_one_after_the_other_recompile_once",
    "tests/test_absent.py::test_the_guard_is_compiled_once_per_torch",
    "tests/test_absent.py::test_what_goes_wrong_in_the_child_is_told",
    "tests/test_absent.py::test_without_a_compiler_the_guard_is_borrowed",
    "tests/test_add_an_op.py::test_a_fault_in_its_kernel_fails_its_test",
    "tests/test_backend_plugin.py::test_its_kernel_is_right_where_it_does_not_refuse",
    "tests/test_examples.py::test_the_decode_step_is_one_graph_on_xpu",
    "tests/test_launch_tables.py::test_tuning_goes_on_where_it_was",
    "tests/test_rehearsal.py::test_what_does_not_fit_goes_on_to_the_next_backend_with_one_sentence",
    "tests/test_typing.py::test_the_signature_survives",
    "tests/test_warm_up.py::test_a_second_process_compiles_nothing",
    "tests/training/test_hooks.py::test_a_memory_budget",
)


def mark(items: Iterable[pytest.Item]) -> None:
    """Mark as slow what is left out, of the tests that were collected."""
    before = Counter[str]()
    for item in items:
        name = item.nodeid.partition("[")[0]
        number = before[name]
        before[name] += 1
        later = (name in FIRST_CASE and number > 0) or (name in ONE_CASE_IN_FOUR and number % 4 > 0)
        if later or (name in ONE_CASE_IN_EIGHT and number % 8 > 0) or name in NOT_DAILY:
            item.add_marker(pytest.mark.slow)
