"""What the whole suite is asked on the command line."""


def pytest_addoption(parser):
    parser.addoption(
        "--new-pictures", action="store_true", help="write the pages' reference pictures (test_browser.py)"
    )
