"""Several processes: start, comparison, loss of a peer."""

from tests.mutations.mutation import Mutation

PROCESSES, TEST_PROCESSES = "vit_jax/multihost/processes.py", "tests/multihost/test_processes.py"
HEARTBEATS = "vit_jax/multihost/heartbeats.py"
RENDEZVOUS, TEST_RENDEZVOUS = "vit_jax/multihost/rendezvous.py", "tests/multihost/test_rendezvous.py"
CLUSTER, TEST_CLUSTER = "vit_jax/multihost/cluster.py", "tests/multihost/test_cluster.py"

MUTATIONS = [
    Mutation(
        HEARTBEATS,
        "if self._answered - at > self._lost_after}",
        "if False}",
        "tests/test_faults.py::test_survivor_of_a_killed_process_ends_with_one_message_and_the_status_to_restart",
        "survivors of a lost process end",
    ),
    Mutation(
        HEARTBEATS,
        "self._answered - at > self._lost_after",
        "now - at > self._lost_after",
        f"{TEST_PROCESSES}::test_no_other_process_counts_as_lost_while_process_0_does_not_answer",
        "the error names the lost process",
    ),
    Mutation(
        PROCESSES,
        "if values[process] != values[0]]",
        "if False]",
        f"{TEST_PROCESSES}::test_equal_values_pass_and_differing_ones_are_named_in_all_processes",
        "processes with other configs or data are refused",
    ),
    Mutation(
        PROCESSES,
        "use = self.uses[name] = self.uses.get(name, 0) + 1",
        "use = self.uses[name] = 1",
        f"{TEST_PROCESSES}::test_barrier_names_can_be_reused",
        "a barrier can be used again",
    ),
    Mutation(
        RENDEZVOUS,
        "if not hmac.compare_digest(proof, _proof(token, nonce, text)):",
        "if False:",
        f"{TEST_RENDEZVOUS}::test_stranger_without_the_token_cannot_join "
        f"{TEST_RENDEZVOUS}::test_process_with_another_token_is_reported",
        "who does not know the token is no member",
    ),
    Mutation(
        RENDEZVOUS,
        'nonce.encode() + b" " + text',
        "text",
        f"{TEST_RENDEZVOUS}::test_impostor_in_the_place_of_process_0_is_not_believed",
        "an answer that was recorded earlier proves nothing",
    ),
    Mutation(
        RENDEZVOUS,
        "if process in self._hosts:",
        "if False:",
        f"{TEST_RENDEZVOUS}::test_two_processes_of_the_same_number_are_refused_by_all",
        "two processes of one number are refused",
    ),
    Mutation(
        RENDEZVOUS,
        'for what, said in (("num_processes", "was started for {} processes"), ("versions", "runs {}")):',
        'for what, said in (("num_processes", "was started for {} processes"),):',
        f"{TEST_RENDEZVOUS}::test_process_of_another_version_is_refused",
        "a process of another version is refused",
    ),
    Mutation(
        RENDEZVOUS,
        "if len(self._strangers) > _MAX_STRANGERS:",
        "if False:",
        f"{TEST_RENDEZVOUS}::test_a_thousand_silent_connections_do_not_keep_members_out",
        "silent connections do not use up the descriptors",
    ),
    Mutation(
        CLUSTER,
        "process_id = slice_id * len(hosts) + _number",
        "process_id = _number",
        f"{TEST_CLUSTER}::test_several_slices_are_one_run",
        "processes are numbered over all slices",
    ),
    Mutation(
        CLUSTER,
        "alone = on_this_node == 1 or len(gpus) < on_this_node",
        "alone = on_this_node == 1",
        f"{TEST_CLUSTER}::test_several_tasks_on_a_node_share_its_gpus_unless_slurm_has_dealt_them_out",
        "GPUs that SLURM has dealt out are all a task's own",
    ),
]
