"""What a run writes: checkpoints, workdir, metrics, costs; how it ends: signals, watchdog, NaN."""

from tests.mutations.mutation import Mutation

CHECKPOINTS, TEST_CHECKPOINTS = "vit_jax/checkpoints.py", "tests/test_checkpoints.py"
FILES, TEST_FILES = "vit_jax/files.py", "tests/test_files.py"
WORKDIR, TEST_WORKDIR = "vit_jax/run/workdir.py", "tests/run/test_workdir.py"
METRICS, TEST_METRICS = "vit_jax/run/journal.py", "tests/run/test_journal.py"
ACCOUNTING, TEST_ACCOUNTING = "vit_jax/run/accounting.py", "tests/run/test_accounting.py"
TRAIN, TEST_TRAIN = "vit_jax/train.py", "tests/test_train.py"
TEST_FACTS = "tests/run/test_facts.py"
JSON, TEST_JSON = "vit_jax/json_files.py", "tests/test_json_files.py"

MUTATIONS = [
    Mutation(
        CHECKPOINTS,
        "return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)",
        "return jnp.sum(bits, dtype=jnp.uint32)",
        f"{TEST_CHECKPOINTS}::test_fingerprints_do_not_depend_on_sharding_and_notice_swaps",
        "a fingerprint notices values that changed places",
    ),
    Mutation(
        CHECKPOINTS,
        "for name, value in expected.items() if found[name] != value]",
        "for name, value in expected.items() if False]",
        f"{TEST_CHECKPOINTS}::test_whatever_is_changed_in_a_checkpoint_sets_it_aside "
        f"{TEST_CHECKPOINTS}::test_a_single_flipped_bit_is_noticed",
        "a changed array is noticed",
    ),
    Mutation(
        CHECKPOINTS,
        "json.dumps([step, contents], sort_keys=True)",
        "json.dumps([contents], sort_keys=True)",
        f"{TEST_CHECKPOINTS}::test_checkpoints_that_were_renamed_to_each_other_are_set_aside",
        "a checkpoint knows its step",
    ),
    Mutation(
        CHECKPOINTS,
        "is_intact = extra.pop(_CHECKSUM) == _checksum(step, extra)",
        "is_intact = bool(extra.pop(_CHECKSUM))",
        f"{TEST_CHECKPOINTS}::test_whatever_is_changed_in_a_checkpoint_sets_it_aside",
        "changed extra data are noticed by their SHA-256",
    ),
    Mutation(
        CHECKPOINTS,
        "for step in damaged if newest else ():",
        "for step in ():",
        f"{TEST_CHECKPOINTS}::test_every_truncated_file_is_noticed_and_the_checkpoint_before_is_used "
        f"{TEST_CHECKPOINTS}::test_step_can_be_saved_again_after_its_damaged_checkpoint_was_set_aside",
        "a damaged checkpoint is set aside",
    ),
    Mutation(
        CHECKPOINTS,
        "if isinstance(cause, MemoryError) or any(word in str(cause) for word in passing):",
        "if False:",
        f"{TEST_CHECKPOINTS}::test_trouble_of_this_machine_is_not_taken_for_damage",
        "trouble of this machine is not taken for damage",
    ),
    Mutation(
        CHECKPOINTS,
        "if free < needed:",
        "if False:",
        f"{TEST_CHECKPOINTS}::test_too_little_space_is_noticed_before_anything_is_written",
        "too little space is noticed before writing",
    ),
    Mutation(
        CHECKPOINTS,
        'for name in ("average", "params") if any',
        'for name in ("params", "average") if any',
        "tests/test_fine_tuning.py::test_weights_of_a_fine_tuned_run_say_what_its_model_is",
        "the weights of a run are its Polyak average",
    ),
    Mutation(
        CHECKPOINTS,
        "if differing := sorted(name for name in wanted.keys() | saved.keys() if wanted.get(name) != saved.get(name)):",
        "if differing := []:",
        f"{TEST_CHECKPOINTS}::test_checkpoint_of_another_model_is_refused_and_kept",
        "a checkpoint of another model is refused",
    ),
    Mutation(
        FILES,
        "file_lock.acquire(blocking=False)",
        "pass",
        f"{TEST_WORKDIR}::test_second_process_is_kept_out_of_a_workdir_until_the_first_is_done",
        "one process at a time trains in a workdir",
    ),
    Mutation(
        FILES,
        "with replacing(path) as temporary:\n            temporary.write_bytes(data)",
        "path.write_bytes(data)",
        f"{TEST_FILES}::test_atomic_write_leaves_the_old_content_when_it_fails",
        "files of a run are replaced atomically",
    ),
    Mutation(
        WORKDIR,
        "if changes and not allow_config_change:",
        "if False:",
        f"{TEST_WORKDIR}::test_other_config_is_refused_with_the_fields_that_differ_and_the_flag",
        "a workdir belongs to one config",
    ),
    Mutation(
        WORKDIR,
        "_changed({**defaults(), **flatten(recorded)}, ",
        "_changed(flatten(recorded), ",
        f"{TEST_WORKDIR}::test_fields_without_effect_may_change_and_younger_fields_had_their_defaults",
        "workdirs from before a field resume",
    ),
    Mutation(
        "vit_jax/run/lease.py",
        "stands_still = found.value == seen and time.monotonic() - since > _LEASE_SECONDS",
        "stands_still = found.value == seen",
        "tests/run/test_lease.py::test_lease_of_another_machine_is_taken_over_when_it_stands_still",
        "a bucket's lock is taken over only after a minute without heartbeat",
    ),
    Mutation(
        "vit_jax/run/metrics.py",
        'return row["step"] < step or (row["step"] == step and not is_evaluation)',
        'return row["step"] <= step',
        f"{TEST_METRICS}::test_rows_that_will_be_made_again_are_dropped_on_resume",
        "evaluations that are made again are dropped on resume",
    ),
    Mutation(
        "vit_jax/run/metrics.py",
        "for row in whole if _is_kept(row, step)",
        "for row in whole",
        f"{TEST_METRICS}::test_rows_that_will_be_made_again_are_dropped_on_resume",
        "metrics after the checkpoint are dropped on resume",
    ),
    Mutation(
        METRICS,
        "self._sums, self._count = {}, 0",
        "self._count = 0",
        f"{TEST_METRICS}::test_windows_average_their_steps",
        "a row is the mean of its steps",
    ),
    Mutation(
        METRICS,
        "if not math.isfinite(value):",
        "if math.isnan(value):",
        f"{TEST_METRICS}::test_value_that_is_not_finite_is_an_error_that_names_the_step",
        "an infinite loss ends the run",
    ),
    Mutation(
        METRICS,
        "if len(self._pending) > self._lag:",
        "if True:",
        f"{TEST_METRICS}::test_steps_are_read_only_after_further_ones_were_dispatched",
        "the loop does not wait for the device",
    ),
    Mutation(
        METRICS,
        'self._count: int = state["count"] if state else 0',
        "self._count: int = 0",
        f"{TEST_METRICS}::test_unfinished_window_goes_on_after_a_restart",
        "a window goes on after a restart",
    ),
    Mutation(
        METRICS,
        'rates["mfu"] = flops / self.machine.bf16_flops',
        'rates["mfu"] = flops / self.machine.bf16_flops / self.machine.num_cores',
        f"{TEST_METRICS}::test_utilisation_is_the_share_of_the_peak_where_that_is_known",
        "MFU is of all devices' peak",
    ),
    Mutation(
        ACCOUNTING,
        "return peak_flops / (TPU_V3_CORE_BF16_FLOPS * 86400)",
        "return peak_flops / (2 * TPU_V3_CORE_BF16_FLOPS * 86400)",
        f"{TEST_ACCOUNTING}::test_costs_are_cores_times_time "
        f"{TEST_ACCOUNTING}::test_other_hardware_counts_as_tpu_v3_cores_of_the_same_peak",
        "core-days are days of a TPUv3 core",
    ),
    Mutation(
        ACCOUNTING,
        'seconds["training"] -= again',
        "pass",
        f"{TEST_ACCOUNTING}::test_steps_that_a_kill_undid_are_not_goodput",
        "steps that a kill undid are not goodput",
    ),
    Mutation(
        ACCOUNTING,
        "kept = min(kept, start.from_step)",
        "kept = start.from_step",
        f"{TEST_ACCOUNTING}::test_falling_back_beyond_a_whole_start_undoes_it_too",
        "a start that another one fell back beyond is undone",
    ),
    Mutation(
        ACCOUNTING,
        "core_seconds[kind] += each * start.machine.num_cores",
        "core_seconds[kind] += each",
        f"{TEST_ACCOUNTING}::test_costs_are_cores_times_time",
        "costs are cores times time",
    ),
    Mutation(
        "vit_jax/experiment/run_records.py",
        "batches.set_state(dict(position))",
        "pass",
        "tests/test_main.py::test_signal_saves_ends_within_ten_seconds_and_resumes_exactly",
        "a restart goes on with the next batch",
    ),
    Mutation(
        "vit_jax/run/run_checkpoints.py",
        "self._best.drop_after(step)",
        "pass",
        f"{TEST_TRAIN}::test_best_parameters_that_a_restart_undid_are_dropped",
        "best/ holds no parameters that a restart undid",
    ),
    Mutation(
        "vit_jax/run/run_checkpoints.py",
        "if not self._keep_best or not accuracy > self._best_accuracy:",
        "if not self._keep_best:",
        "tests/test_main.py::test_best_holds_the_parameters_of_the_best_evaluation",
        "best/ has the parameters of the best accuracy",
    ),
    Mutation(
        "vit_jax/run/run_checkpoints.py",
        'self._checkpoints.set_aside(bad_step - 1, "diverged")',
        "pass",
        "tests/test_main.py::test_nan_loss_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint",
        "a run that diverged resumes from before the bad step",
    ),
    Mutation(
        "vit_jax/experiment/run_records.py",
        "if step > experiment.num_steps:",
        "if False:",
        f"{TEST_FACTS}::test_a_run_is_not_made_shorter_than_it_is",
        "a run is not made shorter than it is",
    ),
    Mutation(
        "vit_jax/multihost/signals.py",
        "if len(self._votes) > _LAG and (signum := int(self._votes.popleft())):",
        "if len(self._votes) > _LAG and (signum := self.signum):",
        "tests/test_faults.py::test_signal_to_one_process_ends_all_with_the_state_of_one_step_saved",
        "a signal to one process stops all at the same step",
    ),
    Mutation(
        "vit_jax/multihost/signals.py",
        "self.signum = signal.SIGTERM if signum == signal.SIGUSR1 else signum",
        "self.signum = None",
        "tests/test_library.py::test_a_signal_in_a_program_saves_and_stops_the_run_and_leaves_the_program_its_handlers",
        "a signal saves and stops the run",
    ),
    Mutation(
        "vit_jax/multihost/signals.py",
        "restore_handlers(self._before)",
        "pass",
        "tests/test_library.py::test_a_signal_in_a_program_saves_and_stops_the_run_and_leaves_the_program_its_handlers",
        "a program keeps its signal handlers",
    ),
    Mutation(
        "vit_jax/multihost/watchdog.py",
        "if elapsed > allowed and label != self._told:",
        "if False:",
        "tests/multihost/test_watchdog.py::test_hung_step_ends_the_process_with_its_status_and_one_message",
        "a step that hangs ends the process",
    ),
    Mutation(
        "vit_jax/multihost/watchdog.py",
        "self._elapsed += min(now - looked, 5 * self._tick)",
        "self._elapsed += now - looked",
        "tests/multihost/test_watchdog.py::test_time_in_which_the_process_was_stopped_does_not_count",
        "a process that was stopped does not count as hung",
    ),
    Mutation(
        "vit_jax/multihost/preemption.py",
        '"instance/preempted": ("FALSE",)',
        '"instance/preempted": ("FALSE", "TRUE")',
        "tests/multihost/test_preemption.py::test_notice_is_told_when_it_comes",
        "a preemption notice saves and stops",
    ),
    Mutation(
        JSON,
        "parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)",
        "parse_constant=_refuse_constant, parse_float=_finite)",
        f"{TEST_JSON}::test_text_that_is_not_json_is_an_error_that_names_it",
        "a key that occurs twice is an error",
    ),
    Mutation(
        JSON,
        "if not path.is_file():",
        "if not path.exists():",
        f"{TEST_JSON}::test_files_that_cannot_be_read_are_errors_that_name_them",
        "a FIFO is not opened",
    ),
]
