package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const report = `<testsuites><testsuite>
<testcase name="[It] [sig-cli] Kubectl a [Conformance]" status="passed"></testcase>
<testcase name="[It] [sig-cli] Kubectl b [Conformance]" status="failed"><failure>no</failure></testcase>
<testcase name="[It] [sig-apps] Job c [Conformance]" status="panicked"><error>no</error></testcase>
<testcase name="[It] [sig-apps] Job d [Conformance]" status="skipped"><skipped></skipped></testcase>
<testcase name="[ReportAfterSuite] e" status="passed"></testcase>
</testsuite></testsuites>`

func TestSummaryCountsAndNamesFailures(t *testing.T) {
	c := config{out: t.TempDir()}
	require.NoError(t, os.WriteFile(c.report(), []byte(report), 0o600))
	require.NoError(t, os.WriteFile(c.log(), []byte("noise\nRan 3 of 9 Specs in 1.0 seconds\nFAIL! -- 1 Passed | 2 Failed\nmore\n"), 0o600))
	var out strings.Builder
	c.summarize(&out)
	require.Equal(t, `sig-apps                  0 passed    1 failed
sig-cli                   1 passed    1 failed
failed: [It] [sig-apps] Job c [Conformance]
failed: [It] [sig-cli] Kubectl b [Conformance]
Ran 3 of 9 Specs in 1.0 seconds
FAIL! -- 1 Passed | 2 Failed
`, out.String())
}

func TestTreesKeepModesAndLinks(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(from, "tmp"), 0o777))
	require.NoError(t, os.Chmod(filepath.Join(from, "tmp"), 0o777|fs.ModeSticky))
	require.NoError(t, os.WriteFile(filepath.Join(from, "tmp", "su"), []byte("x"), 0o600))
	require.NoError(t, os.Chmod(filepath.Join(from, "tmp", "su"), 0o755|fs.ModeSetuid))
	require.NoError(t, os.Symlink("/elsewhere", filepath.Join(from, "link")))
	require.NoError(t, copyTree(from, to))
	for name, mode := range map[string]fs.FileMode{"tmp": fs.ModeDir | fs.ModeSticky | 0o777, "tmp/su": fs.ModeSetuid | 0o755} {
		info, err := os.Stat(filepath.Join(to, name))
		require.NoError(t, err)
		require.Equal(t, mode, info.Mode(), name)
	}
	link, err := os.Readlink(filepath.Join(to, "link"))
	require.NoError(t, err)
	require.Equal(t, "/elsewhere", link)
}
