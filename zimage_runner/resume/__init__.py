"""Finishing an earlier run: which run, with which settings, and what of it is left to do."""

from zimage_runner.resume.command_line import resume_command_line
from zimage_runner.resume.progress import Progress, check_same_pictures, survey
from zimage_runner.resume.settings import restore
from zimage_runner.resume.sweep import job_to_resume, keep_first_settings

__all__ = [
    "Progress",
    "check_same_pictures",
    "job_to_resume",
    "keep_first_settings",
    "restore",
    "resume_command_line",
    "survey",
]
