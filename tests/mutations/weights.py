"""Foreign weights: reading, formats, identification, preprocessing, downloads, transfer."""

from tests.mutations.mutation import Mutation

DOWNLOAD, TEST_DOWNLOAD = "vit_jax/weights/download.py", "tests/weights/test_download.py"
TEST_ADDRESSES = "tests/weights/test_addresses.py"
ARRAYS, TEST_FILES = "vit_jax/weights/arrays.py", "tests/weights/test_arrays.py"
FORMATS, TEST_FORMATS = "vit_jax/weights/formats.py", "tests/weights/test_formats.py"
MAPPING = "vit_jax/weights/mapping.py"
IDENTIFY, TEST_IDENTIFY = "vit_jax/weights/identify.py", "tests/weights/test_identify.py"
PREPROCESSING, TEST_PREPROCESSING = "vit_jax/weights/preprocessing.py", "tests/weights/test_preprocessing.py"
FOREIGN = "vit_jax/weights/foreign_preprocessing.py"
FOLDERS, TEST_FOLDERS = "vit_jax/weights/huggingface.py", "tests/weights/test_folders.py"
TEST_LOAD = "tests/weights/test_load.py"
RELEASED, TEST_RELEASED = "vit_jax/weights/released.py", "tests/weights/test_released.py"
TRANSFER, TEST_TRANSFER = "vit_jax/weights/transfer.py", "tests/weights/test_transfer.py"
FACTS, TEST_FACTS = "vit_jax/run/facts.py", "tests/run/test_facts.py"

MUTATIONS = [
    Mutation(
        DOWNLOAD,
        "if self.sha256 not in (None, sha256.hexdigest()):",
        "if False:",
        f"{TEST_DOWNLOAD}::test_a_wrong_digest_is_an_error_with_both",
        "a file with another digest is refused",
    ),
    Mutation(
        DOWNLOAD,
        "with replacing(self.path) as temporary:",
        "for temporary in [self.path]:",
        f"{TEST_DOWNLOAD}::test_a_file_that_stays_cut_off_is_given_up",
        "a half-written file is never taken for a whole one",
    ),
    Mutation(
        DOWNLOAD,
        "if count - before < window * _SLOWEST:",
        "if False:",
        f"{TEST_DOWNLOAD}::test_a_slow_server_is_given_up",
        "a server that sends too slowly is given up",
    ),
    Mutation(
        DOWNLOAD,
        "if not concurrent.futures.wait([future], timeout=seconds).done:",
        "if False:",
        f"{TEST_DOWNLOAD}::test_a_server_with_slow_headers_is_given_up",
        "a server that sends its headers too slowly is given up",
    ),
    Mutation(
        DOWNLOAD,
        "if _stored_md5(response) not in (None, md5.digest()):",
        "if False:",
        f"{TEST_DOWNLOAD}::test_the_md5_of_google_storage_is_checked",
        "a file that was damaged on its way is refused",
    ),
    Mutation(
        DOWNLOAD,
        'name = name.replace(".", "%2E") or "%"',
        "pass",
        f"{TEST_ADDRESSES}::test_no_name_can_escape_the_cache",
        "no address leads out of the cache",
    ),
    Mutation(
        DOWNLOAD,
        'if new not in ("http", "https") or (old, new) == ("https", "http"):',
        "if False:",
        f"{TEST_DOWNLOAD}::test_a_redirect_never_leads_out_of_https",
        "no redirect leaves https",
    ),
    Mutation(
        DOWNLOAD,
        "check_space(self.path.parent, (total or 0) + _SPARE_BYTES, remedy)",
        "pass",
        f"{TEST_DOWNLOAD}::test_space_is_checked_before_the_download",
        "space is checked before the download",
    ),
    Mutation(
        ARRAYS,
        "if dtype.hasobject:",
        "if False:",
        f"{TEST_FILES}::test_a_pickled_npz_is_refused_and_not_run",
        "a pickle is never run",
    ),
    Mutation(
        ARRAYS,
        "if path.suffix in _PICKLES or start.startswith(_PICKLE_STARTS):",
        "if False:",
        f"{TEST_FILES}::test_a_legacy_torch_file_is_refused_with_the_command_that_converts_it",
        "a pickle is refused with the command that converts it",
    ),
    Mutation(
        ARRAYS,
        "if info.file_size > most:",
        "if False:",
        f"{TEST_FILES}::test_a_member_that_claims_too_many_bytes_is_refused",
        "a zip bomb is not inflated",
    ),
    Mutation(
        ARRAYS,
        "if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:",
        "if bad := []:",
        "tests/weights/test_hostile.py::test_values_that_are_not_numbers_are_refused_by_name_unless_they_are_allowed",
        "weights that are not finite are refused",
    ),
    Mutation(
        ARRAYS,
        'return array.astype(array.dtype.newbyteorder("="), copy=False)',
        "return array",
        f"{TEST_FILES}::test_arrays_in_another_byte_order_or_in_columns_are_read",
        "arrays in another byte order are read as what they are",
    ),
    Mutation(
        ARRAYS,
        "if not dtype.hasobject and found != math.prod(shape) * dtype.itemsize:",
        "if False:",
        f"{TEST_FILES}::test_a_member_that_is_not_what_its_header_declares_is_refused",
        "a member has as many bytes as its header declares",
    ),
    Mutation(
        MAPPING,
        "parts = np.split(array, len(names)) if len(names) > 1 else [array]",
        "parts = np.split(array, len(names))[::-1] if len(names) > 1 else [array]",
        f"{TEST_FORMATS}::test_their_names_and_layouts_are_read",
        "timm's qkv is read",
    ),
    Mutation(
        MAPPING,
        "lambda array, heads: array.T.reshape(_known(heads), -1, array.shape[0])",
        "lambda array, heads: array.reshape(_known(heads), -1, array.shape[0])",
        f"{TEST_FORMATS}::test_their_names_and_layouts_are_read",
        "the attention's output projection is read",
    ),
    Mutation(
        MAPPING,
        "if unknown:\n            raise UserError(",
        "if False:\n            raise UserError(",
        f"{TEST_FORMATS}::test_names_that_no_rule_knows_are_listed",
        "names that no rule matches are errors",
    ),
    Mutation(
        FORMATS,
        'Rule(_BLOCK + "LayerNorm_1/", _BLOCK + "LayerNorm_2/")',
        'Rule(_BLOCK + "LayerNorm_2/", _BLOCK + "LayerNorm_2/")',
        f"{TEST_FORMATS}::test_their_names_and_layouts_are_read",
        "big_vision's second layer norm is called LayerNorm_1",
    ),
    Mutation(
        FORMATS,
        '(("a", "1"), ("b", "2"), ("c", "3"))',
        '(("a", "2"), ("b", "1"), ("c", "3"))',
        f"{TEST_FORMATS}::test_their_names_and_layouts_are_read",
        "BiT's convolutions a, b and c come in this order",
    ),
    Mutation(
        FORMATS,
        'arrays |= {"cls": arrays["cls"] + positions[:, :1], POSITIONS: positions[:, 1:]}',
        "arrays |= {POSITIONS: positions[:, 1:]}",
        f"{TEST_FORMATS}::test_big_visions_class_token_takes_over_its_position "
        f"{TEST_FORMATS}::test_to_big_vision_and_back_changes_no_logits",
        "big_vision's class token takes over its position",
    ),
    Mutation(
        FORMATS,
        'attributes={"root_padding": "lowest"}',
        "attributes={}",
        f"{TEST_LOAD}::test_the_padding_of_bits_root_goes_with_the_format_and_the_description",
        "big_vision's BiT pads its pooling with the lowest values",
    ),
    Mutation(
        IDENTIFY,
        'found["pool"] = "map" if "MAPHead_0/probe" in shapes else "gap"',
        'found["pool"] = "gap"',
        f"{TEST_IDENTIFY}::test_a_model_of_other_dimensions_is_identified_by_its_names_and_shapes",
        "attention pooling is recognised",
    ),
    Mutation(
        IDENTIFY,
        "in VARIANTS.items() if variant == found)",
        "in VARIANTS.items() if variant.hidden_dim == found.hidden_dim)",
        f"{TEST_IDENTIFY}::test_a_model_is_identified_by_its_names_and_shapes",
        "ViT-b is not taken for ViT-S, which is as wide",
    ),
    Mutation(
        IDENTIFY,
        "if not (missing or extra or differing):",
        "if not (missing or differing):",
        f"{TEST_IDENTIFY}::test_an_array_too_many_is_named",
        "an array too many is an error",
    ),
    Mutation(
        PREPROCESSING,
        "(round(top), round(left)) if self.centre_to_even else (int(top), int(left))",
        "(int(top), int(left))",
        f"{TEST_PREPROCESSING}::test_a_config_of_others_is_computed_as_its_library_computes_it",
        "timm's centre crop is timm's",
    ),
    Mutation(
        PREPROCESSING,
        "scale = 1 / (255 * np.asarray(self.std, np.float32))",
        "scale = 1 / (256 * np.asarray(self.std, np.float32))",
        f"{TEST_PREPROCESSING}::test_mean_and_std_of_a_half_give_minus_one_to_one",
        "images are normalised by mean and std",
    ),
    Mutation(
        FOREIGN,
        'resize="crop" if keeps_ratio else "square"',
        'resize="square"',
        f"{TEST_FOLDERS}::test_a_centre_crop_of_huggingface_is_heeded",
        "Hugging Face's centre crop is heeded",
    ),
    Mutation(
        FOREIGN,
        'crop_fraction=fields.number("crop_pct", 0.875, above=0, at_most=1)',
        "crop_fraction=0.875",
        f"{TEST_FOLDERS}::test_a_foreign_timm_folder_has_labels_and_preprocessing",
        "timm's crop_pct is heeded",
    ),
    Mutation(
        FOLDERS,
        'overrides={"gelu": "exact"} if config.values and _GELUS[activation] == "exact" else {}',
        "overrides={}",
        f"{TEST_FOLDERS}::test_the_exact_gelu_of_huggingface_is_heeded",
        "Hugging Face's exact GELU is heeded",
    ),
    Mutation(
        RELEASED,
        'table_5[models[short]]["ImageNet"], paper)',
        'table_5[models[short]]["ImageNet ReaL"], paper)',
        f"{TEST_RELEASED}::test_the_papers_checkpoints_are_there",
        "published accuracies are the paper's",
    ),
    Mutation(
        RELEASED,
        '("strong1", 0.1, 0.0),    0.01',
        '("strong1", 0.1, 0.0),    0.03',
        TEST_RELEASED,
        "addresses of AugReg's checkpoints are those of the release",
    ),
    Mutation(
        RELEASED,
        'I21K, 224, probabilities="sigmoid")',
        "I21K, 224)",
        f"{TEST_RELEASED}::test_an_entry_agrees_with_itself",
        "AugReg's pre-trained heads predict with the sigmoid",
    ),
    Mutation(
        TRANSFER,
        'anew = {"head": not keep_head,',
        'anew = {"head": False,',
        f"{TEST_TRANSFER}::test_the_head_starts_at_zero_and_all_else_is_transferred",
        "fine-tuning begins with a head of zeros",
    ),
    Mutation(
        TRANSFER,
        ", old_grid=old_grid",
        "",
        f"{TEST_TRANSFER}::test_a_grid_that_was_not_square_is_interpolated_along_each_axis",
        "a grid that was not square is interpolated along each axis",
    ),
    Mutation(
        TRANSFER,
        'for attribute in ("gelu", "position_embedding_at", "root_padding"):',
        'for attribute in ("position_embedding_at", "root_padding"):',
        f"{TEST_TRANSFER}::test_a_difference_that_no_array_shows_is_refused",
        "another GELU than the weights' is refused",
    ),
    Mutation(
        TRANSFER,
        "arrays[name] = array[:, before - after :]",
        "arrays[name] = array[:, : array.shape[1] - before + after]",
        f"{TEST_TRANSFER}::test_a_class_token_is_dropped_with_its_position",
        "a class token is dropped with its own position",
    ),
    Mutation(
        FACTS,
        "if source.fingerprint() == before.fingerprint:",
        "if True:",
        f"{TEST_FACTS}::test_changed_data_are_refused_with_what_differs",
        "a run notices that its data changed",
    ),
    Mutation(
        FACTS,
        "if before is None or now is None or list(before) == list(now):",
        "if before is None or now is None or set(before) == set(now):",
        f"{TEST_FACTS}::test_changes_of_classes_are_described",
        "classes in another order are other classes",
    ),
    Mutation(
        FACTS,
        "self._labels = np.array([labels.get(name, NO_LABEL) for name in own])",
        "self._labels = np.arange(len(own))",
        f"{TEST_FACTS}::test_several_or_no_labels_are_matched_by_name_too",
        "labels of changed data are matched by name",
    ),
]
