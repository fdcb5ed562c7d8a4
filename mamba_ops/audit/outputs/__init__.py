"""Forms of a report for other programs and other people: SARIF, GitHub's annotations, an issue to paste."""
