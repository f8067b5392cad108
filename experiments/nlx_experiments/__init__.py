# SPDX-License-Identifier: Apache-2.0
"""The `nlx` command and the experiments it runs."""
