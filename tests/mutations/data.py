"""Data: decoding, crops, RandAugment, the order of examples, sources, VTAB's labels and splits, preparation."""

from tests.mutations.mutation import Mutation

AUGMENT, TEST_AUGMENT = "vit_jax/data/randaugment.py", "tests/data/test_randaugment.py"
IMAGES, TEST_IMAGES = "vit_jax/data/transforms.py", "tests/data/test_transforms.py"
HEADERS, TEST_HEADERS = "vit_jax/data/image_headers.py", "tests/data/test_image_headers.py"
ORDER, TEST_ORDER = "vit_jax/data/permutation.py", "tests/data/test_permutation.py"
PIPELINE, TEST_PIPELINE = "vit_jax/data/pipeline.py", "tests/data/test_pipeline.py"
FOLDERS, TEST_FOLDERS = "vit_jax/data/sources/folders.py", "tests/data/test_folders.py"
TREES = "vit_jax/data/sources/trees.py"
VARIANTS, TEST_VARIANTS = "vit_jax/data/sources/imagenet_variants.py", "tests/data/test_imagenet_variants.py"
REAL, TEST_REAL = "vit_jax/data/sources/real_labels.py", "tests/data/test_real_labels.py"
RECORDS, TEST_RECORDS = "vit_jax/data/sources/records.py", "tests/data/test_records.py"
SHARDS, TEST_SHARDS = "vit_jax/data/sources/shards.py", "tests/data/test_shards.py"
SPLITS, TEST_SOURCES = "vit_jax/data/sources/splits.py", "tests/data/test_sources.py"
TFRECORD, TEST_TFRECORD = "vit_jax/data/sources/tfrecord.py", "tests/data/test_tfrecord.py"
TFDS, TEST_TFDS = "vit_jax/data/sources/tfds.py", "tests/data/test_tfds.py"
VTAB_LABELS, TEST_VTAB_LABELS = "vit_jax/data/vtab/task_labels.py", "tests/data/vtab/test_task_labels.py"
VTAB_TASKS, TEST_VTAB_SOURCE = "vit_jax/data/vtab/tasks.py", "tests/data/vtab/test_source.py"
ARCHIVES, TEST_PREPARE = "vit_jax/data/prepare/archives.py", "tests/data/test_prepare.py"
INDEX = "vit_jax/data/prepare/index.py"
PASSES = "vit_jax/data/prepare/passes.py"
LISTS, TEST_SETS = "vit_jax/data/prepare/image_lists.py", "tests/data/test_prepare_sets.py"
DEDUP = "vit_jax/data/prepare/dedup.py"
TEST_DEDUP = "tests/data/test_dedup.py"
NEAR, TEST_NEAR = "vit_jax/data/prepare/near_duplicates.py", "tests/data/test_near_duplicates.py"
LAYOUT = "vit_jax/data/prepare/tfds_layout.py"

MUTATIONS = [
    Mutation(
        "vit_jax/data/sources/digits.py",
        "(np.arange(len(labels)) % 5 == 0)",
        "(np.arange(len(labels)) % 5 == 1)",
        "tests/data/test_sources.py::test_digits_are_those_of_scikit_learn",
        "every fifth digit, from the first on, is a test image",
    ),
    Mutation(
        AUGMENT,
        "np.float32(level * 1.8 + 0.1)",
        "np.float32(level * 1.9)",
        f"{TEST_AUGMENT}::test_operations_give_tensorflows_pixels",
        "enhancements are TensorFlow's",
    ),
    Mutation(
        AUGMENT,
        "if name in rules.directed and rng.random() < 0.5:",
        "if name in rules.directed and rng.random() < 0.1:",
        f"{TEST_AUGMENT}::test_directed_operations_go_either_way",
        "operations with a direction go either way alike",
    ),
    Mutation(
        AUGMENT,
        '"medium2": AugRegSetting(RandAugment(2, 15), 0.5)',
        '"medium2": AugRegSetting(RandAugment(2, 15), 0.2)',
        f"{TEST_AUGMENT}::test_the_settings_of_augreg_match_big_vision",
        "AugReg's settings are big_vision's",
    ),
    Mutation(
        IMAGES,
        "rows = top + height + 1",
        "rows = top + height",
        f"{TEST_IMAGES}::test_a_crop_of_any_height_has_the_pixels_of_the_whole",
        "a decoded crop has the whole image's pixels",
    ),
    Mutation(
        IMAGES,
        "smallest, largest = min_area * height * width, height * width",
        "smallest, largest = 2 * min_area * height * width, height * width",
        f"{TEST_IMAGES}::test_inception_crops_are_distributed_as_tensorflows",
        "inception crops are distributed as TensorFlow's",
    ),
    Mutation(
        IMAGES,
        "if self.flip and rng.random() < 0.5:",
        "if self.flip and rng.random() < 0.9:",
        f"{TEST_IMAGES}::test_train_transform_flips_half_of_the_images",
        "half of the images are flipped",
    ),
    Mutation(
        IMAGES,
        "pixels = 255 - pixels",
        "pass",
        f"{TEST_IMAGES}::test_every_kind_of_file_decodes_to_tensorflows_pixels",
        "CMYK JPEGs without Adobe's marker store ink",
    ),
    Mutation(
        IMAGES,
        "top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2",
        "top, left = 0, (image.shape[1] - size) // 2",
        f"{TEST_IMAGES}::test_central_crop_is_tensorflows",
        "evaluation crops the centre",
    ),
    Mutation(
        HEADERS,
        "if height * width > MAX_PIXELS:",
        "if False:",
        f"{TEST_IMAGES}::test_decompression_bombs_are_refused_by_their_headers",
        "decompression bombs are refused",
    ),
    Mutation(
        HEADERS,
        "number in (3, 4, 6, 7), number in (2, 3, 7, 8)",
        "number in (2, 3, 7, 8), number in (3, 4, 6, 7)",
        f"{TEST_HEADERS}::test_exif_orientation_is_pillows",
        "photos are turned as EXIF says",
    ),
    Mutation(
        ORDER,
        "np.uint64(0x9E3779B97F4A7C15)",
        "np.uint64(0x9E3779B97F4A7C17)",
        f"{TEST_ORDER}::test_order_does_not_change_between_versions",
        "the order of examples is the same in every version",
    ),
    Mutation(
        PIPELINE,
        "seed = (self._seed + part * 0x85EBCA6B + epoch) % 2**32",
        "seed = (self._seed + part * 0x85EBCA6B) % 2**32",
        f"{TEST_PIPELINE}::test_every_epoch_has_each_example_once_in_a_new_order",
        "each epoch has its own order",
    ),
    Mutation(
        PIPELINE,
        "self._seed = seed * 0x9E3779B1",
        "self._seed = seed",
        f"{TEST_PIPELINE}::test_neighbouring_seeds_share_no_order_in_any_epoch",
        "neighbouring seeds share no epoch's order",
    ),
    Mutation(
        PIPELINE,
        "rng = random.at(positions[i])",
        "rng = random.at(index)",
        f"{TEST_PIPELINE}::test_augmentation_differs_between_epochs",
        "augmentation differs between epochs",
    ),
    Mutation(
        PIPELINE,
        'self._num_done = state["images"] // self._batch_size',
        'self._num_done = state["images"] // self._batch_size + 1',
        f"{TEST_PIPELINE}::test_restored_iterator_continues_exactly",
        "a restart continues with the next batch",
    ),
    Mutation(
        PIPELINE,
        'if state["examples"] != self._fingerprint:',
        "if False:",
        f"{TEST_PIPELINE}::test_state_of_another_data_set_is_refused",
        "a run does not go on with other data",
    ),
    Mutation(
        PIPELINE,
        'return batch | {"mask": is_there.astype(np.float32)}, bad',
        'return batch | {"mask": np.ones_like(is_there, np.float32)}, bad',
        f"{TEST_PIPELINE}::test_evaluation_counts_every_example_once_and_masks_the_padding",
        "evaluation masks the padding",
    ),
    Mutation(
        PIPELINE,
        "if self.count > self._limit:",
        "if False:",
        f"{TEST_PIPELINE}::test_bad_records_are_left_out_and_reported_up_to_the_limit",
        "more bad records than allowed end the run",
    ),
    Mutation(
        PIPELINE,
        "weakref.finalize(array, self._free.append, memory)",
        "self._free.append(memory)",
        f"{TEST_PIPELINE}::test_memory_is_reused_only_without_views_of_it "
        f"{TEST_PIPELINE}::test_batches_that_are_kept_keep_their_images",
        "a batch's memory is used again only when nobody holds it",
    ),
    Mutation(
        PIPELINE,
        "return start + _shuffled(position, stop - start, seed)",
        "return _shuffled(position, stop - start, seed)",
        f"{TEST_PIPELINE}::test_mixture_draws_by_weight_and_uses_each_source_once_before_repeating",
        "a mixture draws from each of its sources",
    ),
    Mutation(
        FOLDERS,
        'return name if name.isascii() else unicodedata.normalize("NFC", name)',
        "return name",
        f"{TEST_FOLDERS}::test_names_that_differ_in_unicode_form_are_the_same_class",
        "class names are compared in one Unicode form",
    ),
    Mutation(
        FOLDERS,
        "return sorted(names) if",
        "return names if",
        f"{TEST_FOLDERS}::test_the_folder_is_listed_in_any_order",
        "the order of examples does not depend on the file system",
    ),
    Mutation(
        FOLDERS,
        "        if class_names is not None:\n            self._relabel(class_names)",
        "        if class_names is not None:\n            self.class_names = class_names",
        f"{TEST_FOLDERS}::test_a_split_may_lack_classes_of_the_training_split",
        "a split that lacks classes keeps the training split's labels",
    ),
    Mutation(
        TREES,
        'return name.startswith(("/", "\\\\")) or ".." in parts or parts[0][1:2] == ":"',
        "return False",
        f"{TEST_FOLDERS}::test_paths_out_of_a_zip_are_refused",
        "a zip file with a path out of its folder is refused",
    ),
    Mutation(
        TREES,
        "if zlib.crc32(content) != crc:",
        "if False:",
        f"{TEST_SOURCES}::test_damaged_member_of_a_zip_is_named_when_it_is_read_and_others_are_read",
        "damage in a zip file is noticed",
    ),
    Mutation(
        TREES,
        "decompress(content, size + 1)",
        "decompress(content)",
        f"{TEST_FOLDERS}::test_a_member_that_inflates_without_end_is_stopped_at_the_size_it_claims",
        "zip bombs are stopped",
    ),
    Mutation(
        VARIANTS,
        "OBJECTNET_BORDER = 2",
        "OBJECTNET_BORDER = 1",
        f"{TEST_VARIANTS}::test_red_border_is_cut_off",
        "ObjectNet's border is cut off",
    ),
    Mutation(
        VARIANTS,
        "classes = {str(label): (label,) for label in range(NUM_CLASSES)}",
        "classes = {name: (label,) for label, name in enumerate(sorted(map(str, range(NUM_CLASSES))))}",
        f"{TEST_VARIANTS}::test_folders_of_imagenet_v2_are_numbers_though_they_sort_as_text",
        "ImageNet-V2's folders are numbers",
    ),
    Mutation(
        VARIANTS,
        "classes = occurring if len(occurring) < NUM_CLASSES else None",
        "classes = None",
        f"{TEST_VARIANTS}::test_folders_of_wordnet_ids_get_imagenets_labels_and_only_their_classes_compete",
        "only the 200 classes of ImageNet-R compete",
    ),
    Mutation(
        REAL,
        '"label": self._labels[self._number(example, index) - 1]}',
        '"label": self._labels[index]}',
        f"{TEST_REAL}::test_labels_are_found_by_the_number_in_the_name",
        "ReaL labels are found by the image's number",
    ),
    Mutation(
        TFRECORD,
        "if masked_checksum(content) != _CHECKSUM.unpack(file.read(begin + size, _CHECKSUM.size))[0]:",
        "if False:",
        f"{TEST_RECORDS}::test_damaged_record_is_named_when_it_is_read_and_others_are_read",
        "a damaged record is noticed",
    ),
    Mutation(
        TFRECORD,
        "return offsets if np.array_equal(identity, _identity(offsets, status)) else None",
        "return offsets",
        f"{TEST_TFRECORD}::test_damaged_index_is_made_again "
        f"{TEST_TFRECORD}::test_rewritten_file_of_the_same_size_is_indexed_again",
        "an index of another file is made again",
    ),
    Mutation(
        TFRECORD,
        "if offsets[-1] > size:\n        offsets.pop()",
        "pass",
        f"{TEST_TFRECORD}::test_truncated_file_is_refused_with_the_record_and_its_offset",
        "a truncated file is refused",
    ),
    Mutation(
        RECORDS,
        "None if callable(label) else label",
        "label",
        f"{TEST_RECORDS}::test_fingerprint_has_the_name_of_the_rule_that_derives_a_label",
        "runs of earlier versions find their data unchanged",
    ),
    Mutation(
        "vit_jax/data/sources/array_record.py",
        "needed = count + _OTHER_FILES",
        "needed = count",
        f"{TEST_RECORDS}::test_limit_of_open_files_is_raised_for_array_record_files_as_far_as_may_be",
        "array_record files may all be open",
    ),
    Mutation(
        FOLDERS,
        'if _holds_images(tree, f"{around}{top}/", 2)]',
        'if _holds_images(tree, f"{around}{top}/", 3)]',
        f"{TEST_FOLDERS}::test_the_folder_around_the_splits_may_have_neighbours",
        "folders around the splits are looked through",
    ),
    Mutation(
        "vit_jax/data/vtab/source.py",
        "Part(part.split, part.start + first, part.start + last)",
        "Part(part.split, first, last)",
        TEST_VTAB_SOURCE,
        "slices of VTAB's splits count from their own beginning",
    ),
    Mutation(
        "vit_jax/data/transfer_tasks.py",
        "round(0.9 * len(source or ()))",
        "len(source or ())",
        "tests/data/test_transfer_tasks.py::test_length_goes_by_the_images_that_are_trained_on_in_the_end",
        "BiT-HyperRule counts the images that are trained on",
    ),
    Mutation(
        RECORDS,
        "labels = [label for label in dict.fromkeys(values) if label != NO_LABEL]",
        "labels = list(values)",
        f"{TEST_RECORDS}::test_several_labels_are_lists_without_repetition_and_missing_ones_empty",
        "a label that occurs twice counts once",
    ),
    Mutation(
        SHARDS,
        "if missing := sorted(set(range(int(total))) - numbers):",
        "if missing := ():",
        f"{TEST_SHARDS}::test_missing_shard_is_named_unless_the_pattern_chooses",
        "a missing shard is named",
    ),
    Mutation(
        SPLITS,
        "low, high = max(start - first, 0), min(stop - first, length)",
        "low, high = max(start - first, 0), min(stop - first + 1, length)",
        f"{TEST_RECORDS}::test_slices_of_shards_are_resolved",
        "slices of splits do not overlap",
    ),
    Mutation(
        SPLITS,
        "return permutation(length, 0)[part.start : part.stop]",
        "return np.arange(length)[part.start : part.stop]",
        f"{TEST_SOURCES}::test_slices_of_a_folder_have_all_classes",
        "a slice of a folder has all classes",
    ),
    Mutation(
        "vit_jax/data/overlap.py",
        "is_member |= (wanted >= other.start) & (wanted < other.stop)",
        "pass",
        "tests/data/test_overlap.py::test_files_of_records_by_any_pattern_and_as_single_files",
        "training on test examples is noticed",
    ),
    Mutation(
        TFDS,
        'return max(wanted, key=lambda path: tuple(map(int, path.name.split("."))))',
        "return max(wanted)",
        f"{TEST_TFDS}::test_data_set_is_found_by_name_config_and_version",
        "the newest version is taken",
    ),
    Mutation(
        VTAB_LABELS,
        "number = bisect.bisect_left(lower_ends, value) - 1",
        "number = bisect.bisect_right(lower_ends, value) - 1",
        TEST_VTAB_LABELS,
        "distances on a bin's border are VTAB's",
    ),
    Mutation(
        VTAB_LABELS,
        "* 16 // 40",
        "* 16 // 41",
        TEST_VTAB_LABELS,
        "dSprites' orientations are VTAB's classes",
    ),
    Mutation(
        VTAB_LABELS,
        "strict=True) if kind < _VEHICLES]",
        "strict=True)]",
        TEST_VTAB_LABELS,
        "KITTI's distance is that of the closest vehicle",
    ),
    Mutation(
        VTAB_TASKS,
        '"train800val200": f"train[:800]+{val200}"',
        '"train800val200": "train[:1000]"',
        TEST_VTAB_SOURCE,
        "VTAB-1k is 800 training and 200 validation examples",
    ),
    Mutation(
        VTAB_TASKS,
        '_splits("train[:16200]", "train[16200:21600]", "train[21600:]")',
        '_splits("train[:16201]", "train[16201:21600]", "train[21600:]")',
        "tests/data/vtab/test_tasks.py",
        "VTAB's splits are carved where its authors carve them",
    ),
    Mutation(
        VTAB_TASKS,
        'members["mean"] = list(TASKS)',
        'members["mean"] = list(TASKS)[:-1]',
        "tests/data/vtab",
        "VTAB's mean is over 19 tasks",
    ),
    Mutation(
        ARCHIVES,
        'if is_unsafe(member.name) or "\\0" in member.name:',
        'if "\\0" in member.name:',
        f"{TEST_PREPARE}::test_paths_out_of_the_folder_are_refused",
        "a tar file with a path out of its folder is refused",
    ),
    Mutation(
        ARCHIVES,
        'if is_unsafe(member.name) or "\\0" in member.name:',
        "if is_unsafe(member.name):",
        "tests/data/test_prepare_input.py::test_invalid_tars_are_one_message",
        "a tar file with a zero byte in a path is refused",
    ),
    Mutation(
        ARCHIVES,
        "if end != tarfile.NUL * tarfile.BLOCKSIZE and (strict or end):",
        "if False:",
        f"{TEST_PREPARE}::test_an_archive_cut_between_two_members_is_an_error",
        "a truncated tar file is noticed",
    ),
    Mutation(
        INDEX,
        "FROM image\n      GROUP BY split, content\n      ORDER",
        "FROM image\n      GROUP BY split, content, labels\n      ORDER",
        f"{TEST_PREPARE}::test_copies_are_one_example_with_the_labels_of_all",
        "copies of an image become one example with the labels of all",
    ),
    Mutation(
        INDEX,
        'return hashlib.md5(f"{split}{key}".encode()',
        'return hashlib.md5(f"{key}{split}".encode()',
        f"{TEST_PREPARE}::test_the_order_matches_tfds",
        "prepared examples have the order of TFDS",
    ),
    Mutation(
        PASSES,
        "index.commit(mark=found.mark, done=found.done)",
        "index.commit(done=found.done)",
        f"{TEST_PREPARE}::test_killed_again_and_again_it_gives_the_same_bytes",
        "a killed preparation resumes and gives the same bytes",
    ),
    Mutation(
        PASSES,
        "if content_hash(content) != row.content:",
        "if False:",
        f"{TEST_PREPARE}::test_an_image_that_changes_after_the_scan_is_noticed",
        "an image that changes after the scan is noticed",
    ),
    Mutation(
        "vit_jax/data/prepare/work.py",
        "if begun and before != settings:",
        "if False:",
        f"{TEST_PREPARE}::test_other_settings_do_not_mix_with_a_begun_data_set",
        "a preparation does not go on with other settings",
    ),
    Mutation(
        "vit_jax/data/prepare/work.py",
        "(folder / name).stat().st_size == shard.bytes",
        "(folder / name).stat().st_size <= shard.bytes",
        f"{TEST_PREPARE}::test_a_shard_cut_short_is_written_again",
        "a shard that a full disk cut short is written again",
    ),
    Mutation(
        "vit_jax/data/prepare/work.py",
        '(("settings", manifest["settings"], settings), ("files", made, source))',
        '(("settings", manifest["settings"], settings),)',
        f"{TEST_SETS}::test_images_added_to_a_folder_are_noticed",
        "a finished data set is not taken for that of other files",
    ),
    Mutation(
        "vit_jax/data/prepare/image_folders.py",
        "labels = (source.class_names[label],)",
        "labels = (source.class_names[0],)",
        f"{TEST_SETS}::test_a_folder_gives_its_splits_and_classes",
        "prepared folders keep their classes",
    ),
    Mutation(
        FOLDERS,
        "if kind is Kind.FOLDER and (only is None or entry in only):",
        "if kind is Kind.FOLDER:",
        f"{TEST_VARIANTS}::test_objects_get_the_classes_that_the_authors_map_to_them",
        "ObjectNet's objects without a class of ImageNet are left out",
    ),
    Mutation(
        LAYOUT,
        'elif file_sha256(path) != facts["sha256"]:',
        "elif False:",
        f"{TEST_PREPARE}::test_check_finds_damage",
        "check finds changed bytes",
    ),
    Mutation(
        LISTS,
        "inside = os.path.commonpath([real, self._real_root]) == self._real_root",
        "inside = True",
        f"{TEST_SETS}::test_a_list_does_not_lead_out_of_its_folder",
        "a list does not lead out of its folder",
    ),
    Mutation(
        NEAR,
        "distance = np.bitwise_count(queries[query, 1:] ^ targets[target, 1:])",
        "distance = np.bitwise_count(queries[query, 1:2] ^ targets[target, 1:2])",
        f"{TEST_NEAR}::test_the_search_finds_what_comparing_all_with_all_finds",
        "near-duplicates agree in the long hash",
    ),
    Mutation(
        NEAR,
        "masks = _masks(near // _BANDS)",
        "masks = _masks(near // _BANDS - 1)",
        f"{TEST_NEAR}::test_the_search_finds_what_comparing_all_with_all_finds",
        "the search for near-duplicates misses none",
    ),
    Mutation(
        DEDUP,
        "targets = np.concatenate([*plain, *mirrored])",
        "targets = np.concatenate([*plain, *plain])",
        f"{TEST_DEDUP}::test_copies_of_test_images_are_removed_and_others_kept",
        "mirrored copies are found",
    ),
]
