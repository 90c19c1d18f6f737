package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTableHasMediansRatiosAndSpreads(t *testing.T) {
	out := &results{}
	for _, v := range []float64{40, 10, 20} {
		out.cost("cost (us)", "upstream", v)
		out.throughput("speed (ops/s)", "upstream", v)
	}
	for _, v := range []float64{2, 4, 8} {
		out.cost("cost (us)", "knarr", v)
		out.throughput("speed (ops/s)", "knarr", v)
	}
	out.cost("one side", "knarr", 1)
	require.Equal(t, "name\tupstream\tknarr\tratio\tupstream min\tupstream max\tknarr min\tknarr max\truns\n"+
		"cost (us)\t20.0\t4.00\t5.00\t10.0\t40.0\t2.00\t8.00\t3\n"+
		"speed (ops/s)\t20.0\t4.00\t0.20\t10.0\t40.0\t2.00\t8.00\t3\n"+
		"one side\t-\t1.00\t-\t-\t-\t1.00\t1.00\t1\n", out.tsv())
	require.Equal(t, 15.0, spreadOf([]float64{20, 10}).median)
}

func TestPageKeepsWhatIsAroundTheTable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "page.md")
	out := &results{}
	require.Error(t, out.write(file, ""), "no page")
	require.NoError(t, os.WriteFile(file, []byte("before\n"+beginMark+"\nold\n"), 0o644))
	require.ErrorContains(t, out.write(file, ""), "no place")
	require.NoError(t, os.WriteFile(file, []byte("before\n"+beginMark+"\nold\n"+endMark+"\nafter\n"), 0o644))
	out.cost("x", "knarr", 3)
	require.NoError(t, out.write(file, "about"))
	require.NoError(t, out.write(file, "about"), "again")
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "before\n"+beginMark+"\nabout\n```\n"+out.tsv()+"```\n"+endMark+"\nafter\n", string(b))

	page, err := os.ReadFile("../../docs/performance.md")
	require.NoError(t, err)
	require.Contains(t, string(page), beginMark)
	require.Contains(t, string(page), endMark)
}

func TestConfigRefusesWhatItDoesNotKnow(t *testing.T) {
	good := config{rounds: 1, objects: 10, connections: 1, sides: []string{"knarr"}, out: t.TempDir()}
	for _, c := range []struct {
		name, phases string
		change       func(*config)
		says         string // empty: accepted
	}{
		{"all", "all", func(*config) {}, ""},
		{"one phase", "api", func(*config) {}, ""},
		{"unknown phase", "api,tea", func(*config) {}, "tea"},
		{"unknown side", "all", func(c *config) { c.sides = []string{"k3s"} }, "k3s"},
		{"no rounds", "all", func(c *config) { c.rounds = 0 }, "-rounds"},
	} {
		config := good
		c.change(&config)
		err := config.complete(c.phases)
		if c.says == "" {
			require.NoError(t, err, c.name)
			require.Empty(t, config.doc, "%s: only a full run writes the page by itself", c.name)
			continue
		}
		require.ErrorContains(t, err, c.says, c.name)
	}
	full := config{rounds: fullRounds, objects: fullObjects, connections: 1, sides: []string{"upstream", "knarr"}, out: t.TempDir(), top: "/x"}
	require.NoError(t, full.complete("all"))
	require.Equal(t, "/x/docs/performance.md", full.doc)
}
