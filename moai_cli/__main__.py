"""`python -m moai_cli`: the same as the `moai` executable."""

from moai_cli.main import main

main()
