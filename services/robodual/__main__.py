from robodual.cli import main

main()
