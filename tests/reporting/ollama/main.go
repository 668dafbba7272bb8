// Renders templates as Ollama does (its template.Execute): reads [{"template", "messages"}] as JSON, writes the texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type job struct {
	Template string     `json:"template"`
	Messages []*message `json:"messages"`
}

// collate joins all system messages, and neighbours of one role.
func collate(messages []*message) (string, []*message) {
	var system []string
	var collated []*message
	for _, each := range messages {
		if each.Role == "system" {
			system = append(system, each.Content)
		}
		if last := len(collated) - 1; last >= 0 && collated[last].Role == each.Role {
			collated[last].Content += "\n\n" + each.Content
		} else {
			collated = append(collated, each)
		}
	}
	return strings.Join(system, "\n\n"), collated
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	var jobs []job
	check(json.NewDecoder(os.Stdin).Decode(&jobs))
	texts := []string{}
	for _, each := range jobs {
		parsed, err := template.New("").Option("missingkey=zero").Parse(each.Template)
		check(err)
		system, messages := collate(each.Messages)
		var text strings.Builder
		check(parsed.Execute(&text, map[string]any{"System": system, "Messages": messages, "Response": ""}))
		texts = append(texts, text.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}
