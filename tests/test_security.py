"""Each numbered line of SECURITY.md has tests, and those of docs/hostile_files.md exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# The subject of each line -> file and tests.
LINES = {
    "Weights files": {
        "test_weights_files": [
            "test_no_code_of_a_pickle_is_run",
            "test_no_instruction_reaches_another_name",
            "test_names_that_the_program_has_registered_as_numbers_are_not_run",
            "test_a_pickle_cannot_change_our_functions",
            "test_the_weights_in_a_checkpoint_of_a_training_program_are_found",
            "test_small_hostile_files_cost_little_memory_and_time",
            "test_files_with_random_faults_are_read_or_one_clear_error",
        ],
    },
    "Run folders and checkpoints": {
        "test_hostile_runs": [
            "test_small_hostile_files_cost_little_time_and_memory",
            "test_texts_of_a_checkpoint_that_are_none_of_ours_are_refused",
            "test_a_configuration_that_is_damaged_is_refused_by_field",
            "test_a_changed_run_folder_is_read_or_refused",
        ],
        "test_checkpoint": ["test_a_damaged_checkpoint_that_was_named_is_refused_in_one_line"],
    },
    "A backbone class that a run folder or weights file names": {
        "test_zoo": ["test_a_backbone_class_that_a_run_names_is_not_imported"],
        "test_own_backbone": ["test_a_run_with_the_backbone_of_the_documentation"],
    },
    "Data sets": {
        "test_bad_cases": [
            "test_no_case_reads_outside_its_folder_or_takes_long",
            "test_inputs_that_would_expand_are_refused_before_they_use_memory",
            "test_spoiled_annotations_give_records_or_one_sentence",
        ],
        "test_links": ["test_links_out_of_the_data_folder_are_refused_unless_allowed"],
        "test_layouts": ["test_a_link_out_of_the_folder_is_refused_unless_links_are_followed"],
        "test_hostile_sets": ["test_small_sets_cost_little"],
        "test_yolo": [
            "test_no_path_leads_out_of_the_folder",
            "test_objects_that_yaml_could_build_are_read_as_text",
            "test_aliases_that_stand_for_billions_of_values_are_refused_at_once",
            "test_random_changes_of_yolo_files_give_records_or_our_error",
        ],
        "test_labelme": [
            "test_no_path_leads_out_of_the_folder",
            "test_random_changes_of_labelme_files_give_records_or_our_error",
        ],
        "test_csv_table": ["test_random_changes_of_csv_tables_give_records_or_our_error"],
    },
    "Images": {
        "test_images": [
            "test_file_that_is_no_image_is_refused_by_name",
            "test_an_image_of_more_pixels_than_allowed_is_refused",
            "test_small_hostile_images_cost_little",
        ],
        "test_bad_cases": ["test_spoiled_images_give_pixels_or_one_sentence"],
    },
    "TFDS folders": {
        "test_tfds": ["test_a_damaged_folder_is_named_in_one_sentence"],
        "test_tfrecord": [
            "test_a_damaged_file_is_named_in_one_sentence",
            "test_random_changes_of_a_file_give_its_records_or_our_error",
        ],
        "test_bad_cases": ["test_spoiled_descriptions_of_tfds_give_records_or_one_sentence"],
    },
    "Archives for `fasterrcnn-jax tfds`": {
        "test_tfds": ["test_archives_that_cannot_be_used_are_named_and_nothing_is_left"],
    },
    "Pipes and devices in place of files": {
        "test_regular_files": [
            "test_a_named_pipe_in_a_run_folder_is_refused",
            "test_a_named_pipe_is_refused",
            "test_a_device_is_refused",
        ],
    },
    "Names in all these files": {
        "test_printing": [
            "test_a_hostile_name_cannot_steer_the_terminal_or_forge_a_line",
            "test_a_log_record_is_one_printable_line",
            "test_the_message_of_an_error_is_printable_for_a_caller_who_catches_it",
            "test_every_module_prints_with_the_one_function",
        ],
        "test_report": [
            "test_no_name_becomes_markup",
            "test_the_policy_allows_the_own_script_and_style_only",
        ],
        "test_history": ["test_a_new_name_in_every_line_takes_no_memory"],
    },
    "Configuration files (`--config FILE.py`) and classes": {
        "test_config": ["test_a_config_file_gives_its_config"],
        "test_own_backbone": ["test_a_missing_class_is_named"],
    },
}


def test_every_line_of_the_page_has_tests():
    page = (TESTS.parent / "SECURITY.md").read_text()
    found = re.findall(r"^([0-9]+)\. \*\*(.+?)\*\*", page, re.MULTILINE)
    assert found == [(str(number), subject) for number, subject in enumerate(LINES, start=1)]
    assert len(LINES) == 10 and all(tests for of_line in LINES.values() for tests in of_line.values())


# The same of docs/hostile_files.md.
PAGE = re.findall(r"`(test_\w+)::(test_\w+)`", (TESTS.parent / "docs" / "hostile_files.md").read_text())
NAMED = {
    *PAGE,
    *((file, name) for of_line in LINES.values() for file, names in of_line.items() for name in names),
}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_the_named_tests_exist_and_run_in_every_suite(file):
    assert len(PAGE) > 50
    functions = {
        node.name: " ".join(map(ast.unparse, node.decorator_list))
        for node in ast.parse((TESTS / f"{file}.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for name in sorted(name for of, name in NAMED if of == file):
        assert name in functions and "mark.slow" not in functions[name], name
