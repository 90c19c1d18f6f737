package api

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"sync"
	"unicode/utf8"
)

// treeEncoder writes JSON trees as encoding/json writes them, with the keys of maps sorted, and without a look at Go types: custom resources
// are encoded at each write.
type treeEncoder struct {
	out []byte
	// keys are those of the maps on the way, a stack.
	keys []string
}

var treeEncoders = sync.Pool{New: func() any { return new(treeEncoder) }}

// maxEncoderBytes bounds the buffer that an encoder keeps for the next tree, in bytes.
const maxEncoderBytes = 64 << 10

// encodeTree gives the JSON of a tree of the types that reading JSON gives, with end appended. Errors: a value of another type, a number that is none.
func encodeTree(tree any, end string) ([]byte, error) {
	e := treeEncoders.Get().(*treeEncoder)
	defer treeEncoders.Put(e)
	e.out, e.keys = e.out[:0], e.keys[:0]
	err := e.value(tree)
	if err != nil {
		return nil, err
	}
	data := make([]byte, 0, len(e.out)+len(end))
	data = append(append(data, e.out...), end...)
	if cap(e.out) > maxEncoderBytes {
		e.out = nil
	}
	return data, nil
}

func (e *treeEncoder) value(v any) error {
	switch v := v.(type) {
	case map[string]any:
		return e.fields(v)
	case []any:
		return e.elements(v)
	case string:
		return e.text(v)
	case int64:
		e.out = strconv.AppendInt(e.out, v, 10)
	case bool:
		e.out = strconv.AppendBool(e.out, v)
	case nil:
		e.out = append(e.out, "null"...)
	case float64:
		return e.float(v)
	default:
		return e.other(v)
	}
	return nil
}

func (e *treeEncoder) fields(m map[string]any) error {
	if m == nil {
		e.out = append(e.out, "null"...)
		return nil
	}
	begin := len(e.keys)
	for name := range m {
		e.keys = append(e.keys, name)
	}
	slices.Sort(e.keys[begin:])
	e.out = append(e.out, '{')
	for i := begin; i < begin+len(m); i++ {
		if i > begin {
			e.out = append(e.out, ',')
		}
		name := e.keys[i]
		if err := e.text(name); err != nil {
			return err
		}
		e.out = append(e.out, ':')
		if err := e.value(m[name]); err != nil {
			return err
		}
	}
	e.out = append(e.out, '}')
	clear(e.keys[begin:])
	e.keys = e.keys[:begin]
	return nil
}

func (e *treeEncoder) elements(l []any) error {
	if l == nil {
		e.out = append(e.out, "null"...)
		return nil
	}
	e.out = append(e.out, '[')
	for i, v := range l {
		if i > 0 {
			e.out = append(e.out, ',')
		}
		if err := e.value(v); err != nil {
			return err
		}
	}
	e.out = append(e.out, ']')
	return nil
}

// text writes a string; one with anything that is written in another way than it is read is left to the library.
func (e *treeEncoder) text(s string) error {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= utf8.RuneSelf || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			return e.other(s)
		}
	}
	e.out = append(append(append(e.out, '"'), s...), '"')
	return nil
}

// float writes a number as the library does, which for most is plain; others are left to it.
func (e *treeEncoder) float(f float64) error {
	if abs := math.Abs(f); abs < 1e-6 || abs >= 1e21 || math.IsNaN(f) {
		return e.other(f)
	}
	e.out = strconv.AppendFloat(e.out, f, 'f', -1, 64)
	return nil
}

// other writes what the library knows better.
func (e *treeEncoder) other(v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	e.out = append(e.out, data...)
	return nil
}
