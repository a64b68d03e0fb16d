"""The parts of the documentation site: the package read as text, notebooks made into pages, tables collected from
both, links checked."""
