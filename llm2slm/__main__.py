from llm2slm import main


main()
